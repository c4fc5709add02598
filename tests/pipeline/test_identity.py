"""Keys: goldens that may only change on purpose, and what must and must not be in them."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from pipeline import identity
from pipeline.artifact import DenseCheckpoint, sha256_file
from pipeline.identity import DigestMemo, canonical, data_key, folder_key, hub_key, model_files, non_default, stage_key
from pipeline.stage import Context, Stage


class Scale(Stage):
    name, version, libraries = "scale", 1, ("torch",)

    class Params(Stage.Params):
        factor: float = 2.0
        mode: Literal["a", "b"] = "a"
        layers: tuple[int, ...] = ()

    class Execution(Stage.Execution):
        batch_size: int = 8

    def run(self, ctx: Context, model: DenseCheckpoint) -> DenseCheckpoint:  # type: ignore[override]
        raise AssertionError

    infer = memory = lambda self, **specs: None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def fixed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "library_version", lambda name: "2.13")


def test_golden_keys() -> None:
    """A change here means that every user's store is recomputed: raise IDENTITY_SCHEMA and say so in the changelog."""
    assert canonical({"b": [1, 2.0, None, True], "a": "\u00e9"}) == '{"a":"\\u00e9","b":[1,2.0,null,true]}'
    assert hub_key("org/model", "abc") == "346ae8126d0846e6f8f747612a3a8afc84a7a08cb530d6e7747561974ba1b9fb"
    assert data_key("text", "jsonl", "00") == "03a15f1f817f82fe8c8b0ba36f84af2a82e7e93d270af2c937f9b474c8b0346a"
    assert folder_key({"config.json": "00"}) == "5a20b4e01d7f0506a95ceb635998ac0aa4dc612b15347641287294f86d6ccb41"
    assert stage_key(Scale(), {"model": "11"}) == "03945231d6157f0265776fbfc5df92834769a97112d2c01d5e36c4366a8a39f7"


def test_the_same_bytes_parsed_another_way_are_other_data() -> None:
    assert data_key("text", "jsonl", "00") != data_key("text", "txt", "00")


def test_execution_is_never_in_a_key() -> None:
    assert stage_key(Scale.from_dict({}, {"batch_size": 1}), {"model": "11"}) == stage_key(Scale(), {"model": "11"})


def test_a_written_default_is_no_change_but_another_value_is() -> None:
    assert stage_key(Scale.from_dict({"factor": 2}), {"model": "11"}) == stage_key(Scale(), {"model": "11"})
    assert stage_key(Scale.from_dict({"factor": 3}), {"model": "11"}) != stage_key(Scale(), {"model": "11"})
    assert stage_key(Scale(), {"model": "12"}) != stage_key(Scale(), {"model": "11"})
    assert non_default(Scale.from_dict({"layers": [1], "mode": "b"}).params) == {"layers": [1], "mode": "b"}


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": object()}, b"bytes", {"set": {1}}])
def test_values_without_a_canonical_form_are_an_error_that_names_the_field(value: object) -> None:
    with pytest.raises(TypeError, match=r"^params.* has no canonical form"):
        canonical(value, "params")


def test_true_one_and_one_point_zero_differ() -> None:
    assert len({canonical(True), canonical(1), canonical(1.0), canonical("1")}) == 4


def test_the_memo_forgets_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    memo = DigestMemo(tmp_path / "memo.json")
    first = memo.compute(file)
    memo.save()
    again = DigestMemo(tmp_path / "memo.json")
    assert again.known(file) == first
    file.write_bytes(b"three")
    assert again.known(file) is None
    assert again.compute(file) != first


def test_the_memo_is_not_deceived_by_a_modification_time_set_back(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = file.stat()
    memo = DigestMemo(tmp_path / "memo.json")
    memo.compute(file)
    time.sleep(0.02)  # longer than the clock of a file system's change times ticks
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert memo.known(file) is None


def test_the_memo_sees_that_another_file_took_the_place(tmp_path: Path) -> None:
    file, other = tmp_path / "weights", tmp_path / "other"
    file.write_bytes(b"one")
    memo = DigestMemo(tmp_path / "memo.json")
    memo.compute(file)
    other.write_bytes(b"two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert memo.known(file) is None


def test_files_hashed_side_by_side_have_their_own_digests_and_are_remembered(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(20)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * (i << 12))
    memo = DigestMemo(tmp_path / "memo.json")
    memo.compute(files[3])
    assert memo.compute_all(files) == [sha256_file(file) for file in files]
    memo.save()
    again = DigestMemo(tmp_path / "memo.json")
    assert [again.known(file) for file in files] == [sha256_file(file) for file in files]
    time.sleep(0.02)  # longer than the clock of a file system's change times ticks
    files[5].write_bytes(b"changed")
    assert again.compute_all(files) == [sha256_file(file) for file in files]


def test_a_file_that_cannot_be_read_is_the_system_s_own_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"one")
    with pytest.raises(IsADirectoryError):
        DigestMemo(tmp_path / "memo.json").compute_all([tmp_path / "file", tmp_path / "folder"])


@pytest.mark.parametrize("content", ["{", "[1]", '{"/x": 5}', '{"/x": [1, 2, "old form"]}', "\x00", "[" * 100_000])
def test_a_damaged_memo_is_only_a_memo(tmp_path: Path, content: str) -> None:
    (tmp_path / "memo.json").write_text(content.replace("/x", str(tmp_path / "weights")))
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert len(DigestMemo(tmp_path / "memo.json").compute(file)) == 64


def test_a_memo_with_nothing_new_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    memo = DigestMemo(tmp_path / "memo.json")
    memo.save()
    assert not memo.file.exists()
    memo.compute(file)
    memo.save()
    written = memo.file.stat().st_ino
    again = DigestMemo(memo.file)
    again.compute(file)
    again.save()
    assert memo.file.stat().st_ino == written


def test_memos_saved_at_once_never_fail_and_leave_one_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    memos = [DigestMemo(tmp_path / "memo.json") for _ in range(200)]
    for memo in memos:
        memo.compute(file)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(DigestMemo.save, memos))
    assert DigestMemo(tmp_path / "memo.json").known(file)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["memo.json", "weights"]


def test_a_model_s_key_covers_every_file_that_its_tokenizer_may_read(tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors", "additional_chat_templates/tools.jinja", "chat_template.json", "vocab.txt", "a.model"]
    for name in [*names, "qwen.tiktoken", "README.md", "additional_chat_templates/notes.txt", "pytorch_model.bin"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(model_files(tmp_path)) == sorted([*names, "qwen.tiktoken"])
