"""The store: whole artifacts or nothing, found only when they are what they claim to be."""

import os
import threading
from pathlib import Path

import pytest

from pipeline.artifact import MANIFEST, Manifest
from pipeline.errors import StoreError
from pipeline.identity import content_digest
from pipeline.store import MARKER, Store, check_writable, digests_read, file_records

KEY = "0123456789abcdef" * 4
SAME_START = KEY[:12] + "f" * 52


def manifest_of(folder: Path, key: str = KEY, read: dict[str, str] | None = None) -> Manifest:
    return Manifest(
        type="EvalReport", key=key, stage="evaluate", version=1, params={}, inputs={}, backend={}, read=read or {},
        files=file_records(folder), environment={}, execution={}, fingerprint="", seconds=1.0, peak_rss=1, created="2025-01-01",
    )  # fmt: skip


def publish(store: Store, key: str = KEY, content: str = "{}", read: dict[str, str] | None = None) -> Path:
    scratch = store.scratch(key)
    (scratch / "sub").mkdir(exist_ok=True)
    (scratch / "report.json").write_text(content)
    (scratch / "sub" / "losses.json").write_text("[1, 2]")
    return store.publish(scratch, manifest_of(scratch, key, read))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def test_what_is_published_is_found_with_its_files(store: Store) -> None:
    folder = publish(store)
    found = store.find("evaluate", KEY)
    assert found is not None and set(found.files) == {"report.json", "sub/losses.json"}
    assert folder == store.path("evaluate", KEY) and (folder / "sub" / "losses.json").read_text() == "[1, 2]"
    assert found.files["report.json"].nbytes == 2
    assert not os.listdir(store.root / "scratch"), "the scratch folder became the artifact"
    assert [manifest for _, manifest in store.all()] == [found]


def test_a_published_file_is_read_only(store: Store) -> None:
    assert (publish(store) / "report.json").stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("damage", ["cut", "missing file", "no manifest", "cut manifest", "empty manifest"])
def test_a_damaged_artifact_does_not_exist_and_is_replaced(store: Store, damage: str) -> None:
    folder = publish(store)
    match damage:
        case "cut":
            os.truncate(folder / "report.json", 1)
        case "missing file":
            (folder / "sub" / "losses.json").unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "cut manifest":
            os.truncate(folder / MANIFEST, 100)
        case "empty manifest":
            (folder / MANIFEST).write_text("{}")
    assert store.find("evaluate", KEY) is None
    publish(store, content='{"again": 1}')
    assert store.find("evaluate", KEY) is not None and (folder / "report.json").read_text() == '{"again": 1}'


def test_another_key_with_the_same_first_digits_is_not_mistaken(store: Store) -> None:
    publish(store)
    assert store.path("evaluate", KEY) == store.path("evaluate", SAME_START)
    assert store.find("evaluate", SAME_START) is None
    publish(store, SAME_START)
    assert store.find("evaluate", SAME_START) is not None and store.find("evaluate", KEY) is None


def test_the_first_of_two_publications_wins(store: Store) -> None:
    folder = publish(store, content="first")
    assert publish(store, content="second") == folder
    assert (folder / "report.json").read_text() == "first"
    assert not os.listdir(store.root / "scratch")


def test_a_report_is_a_hit_only_for_the_bytes_it_was_computed_from(store: Store) -> None:
    folder = publish(store, content="old", read={"model": "a"})
    assert store.find_hit("evaluate", KEY, {"model": "a"}) is not None
    assert store.find_hit("evaluate", KEY, {"model": "b"}) is None
    publish(store, content="new", read={"model": "b"})
    assert (folder / "report.json").read_text() == "new", "a report on bytes that are gone gives way"
    assert store.find_hit("evaluate", KEY, {"model": "b"}) is not None


def test_what_is_read_is_the_bytes_of_an_artifact_and_the_key_of_a_source(store: Store) -> None:
    manifest = Manifest.load(publish(store))
    assert digests_read({"model": "key", "text": "source"}, {"model": manifest, "text": None}) == {
        "model": content_digest(manifest),
        "text": "source",
    }


def test_a_lock_is_held_by_one_and_freed_at_the_end(store: Store) -> None:
    def take() -> None:
        try:
            with store.lock(KEY, timeout=0):
                outcomes.append("got it")
        except TimeoutError as error:
            outcomes.append(str(error))

    outcomes: list[str] = []
    with store.lock(KEY):
        other = threading.Thread(target=take)
        other.start()
        other.join()
    take()
    assert outcomes == [f"another run holds {KEY[:12]}", "got it"]


def test_an_unwritable_folder_is_one_sentence_for_root_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/outputs cannot be used \(Not a directory\); choose another folder"):
        check_writable(tmp_path / "file" / "outputs")
    if Path("/proc/self").exists():  # a file system that no user may write to
        with pytest.raises(StoreError, match=r"^/proc/llmpress"):
            check_writable(Path("/proc/llmpress"))


def test_a_writable_folder_is_made_and_marked_as_llmpress_s(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "outputs")
    assert os.listdir(tmp_path / "new" / "outputs") == [MARKER]
