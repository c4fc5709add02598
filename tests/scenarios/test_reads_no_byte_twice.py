"""What a run writes, links or has hashed before, it does not read again to publish it."""

from pathlib import Path

import pytest

from pipeline.artifact import sha256_file
from pipeline.errors import StageFailed
from pipeline.executor import execute
from pipeline.headers import tensor_table
from pipeline.store import file_records
from tests.stages.models import make_checkpoint
from tests.toys.fixtures import Bench

WEIGHTS = "model.safetensors"
PRUNE = {"intermediate_size": 64, "group_size": 1}
TOLD = "f" * 64  # no file's digest: where it is found, nothing was read


@pytest.fixture
def large(bench: Bench) -> Bench:
    """Of a model of 5 MB, which is more than anything else that a run reads."""
    bench.model = make_checkpoint(bench.folder / "large", vocab_size=20_000)
    return bench


def bytes_read() -> int:
    """By this process, from the page cache too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def overwrite(file: Path, name: str, content: bytes) -> None:
    """The first bytes of a tensor, in place."""
    file.chmod(0o644)
    with open(file, "r+b") as stream:
        stream.seek(tensor_table(file.parent)[name].offset)
        stream.write(content)
    file.chmod(0o444)


def test_what_a_stage_streams_is_published_unread(large: Bench) -> None:
    plan = large.plan(structured_prune=PRUNE)
    before = bytes_read()
    (result,) = execute(plan, large.store, large.run_dir, [], large.server)
    assert bytes_read() - before < (result.path / WEIGHTS).stat().st_size / 2
    assert result.manifest.files == file_records(result.path)


def test_a_linked_file_is_neither_hashed_nor_searched(large: Bench) -> None:
    (pruned,) = large.run(structured_prune=PRUNE)
    record = pruned.manifest.files[WEIGHTS]
    told = pruned.manifest.model_copy(update={"files": pruned.manifest.files | {WEIGHTS: record.model_copy(update={"sha256": TOLD})}})
    (pruned.path / "artifact.json").write_text(told.model_dump_json())
    overwrite(pruned.path / WEIGHTS, "model.embed_tokens.weight", b"\xff" * 64)  # nan, which any look would find
    _, cached = large.run(structured_prune=PRUNE, kv_cache={})
    assert cached.status == "ran" and (cached.path / WEIGHTS).samefile(pruned.path / WEIGHTS)
    assert cached.manifest.files[WEIGHTS].sha256 == TOLD
    assert cached.manifest.files["kv_cache.json"].sha256 == sha256_file(cached.path / "kv_cache.json")


def test_a_copy_is_hashed_and_searched(large: Bench) -> None:
    """Of a source, whose files anybody may change."""
    (cached,) = large.run(kv_cache={})
    assert cached.manifest.files[WEIGHTS].sha256 == sha256_file(large.model / WEIGHTS)
    overwrite(large.model / WEIGHTS, "model.embed_tokens.weight", b"\xff" * 64)
    (large.model / WEIGHTS).chmod(0o644)
    with pytest.raises(StageFailed, match=r"model\.embed_tokens\.weight holds nan or inf"):
        large.run(kv_cache={})


def test_nan_is_told_of_a_stage_that_streams(large: Bench) -> None:
    overwrite(large.model / WEIGHTS, "model.embed_tokens.weight", b"\xff" * 64)
    with pytest.raises(StageFailed, match=r"the checkpoint is not what was planned: model\.embed_tokens\.weight holds nan or inf \(log"):
        large.run(structured_prune=PRUNE)
    assert not list(large.store.all())
