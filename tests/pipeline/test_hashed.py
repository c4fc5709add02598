"""A digest is known for as long as its file is untouched, and of a hard link as long as it is the published file."""

import os
import time
from pathlib import Path

import pytest

from pipeline.artifact import sha256_file
from pipeline.hashed import known, known_below, remember, remember_links
from pipeline.store import file_records

TOLD = "f" * 64  # no file's digest: where it is found, nothing was read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "made" / "sub" / "weights"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    remember(file, TOLD)
    time.sleep(0.02)  # longer than the clock of a file system's change times ticks
    return file


def test_an_untouched_file_is_not_read(file: Path) -> None:
    (file.parent / "other").write_bytes(b"two")
    folder = file.parent.parent
    assert {name: hashed.sha256 for name, hashed in known_below(folder).items()} == {"sub/weights": TOLD}
    records = file_records(folder, known_below(folder))
    assert (records["sub/weights"].sha256, records["sub/weights"].nbytes) == (TOLD, 3)
    assert records["sub/other"].sha256 == sha256_file(file.parent / "other")


@pytest.mark.parametrize("change", ["content", "content, modified as before", "another file", "moved"])
def test_a_file_changed_since_is_hashed_anew(file: Path, change: str) -> None:
    folder, before = file.parent.parent, file.stat()
    hashed = known_below(folder)
    match change:
        case "content":
            file.write_bytes(b"two")
        case "content, modified as before":
            file.write_bytes(b"two")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "another file":
            (folder / "new").write_bytes(b"two")
            (folder / "new").replace(file)
        case "moved":
            file.rename(folder / "elsewhere")
            (folder / "elsewhere").rename(file)
    assert known(file) is None
    assert file_records(folder, hashed)["sub/weights"].sha256 == sha256_file(file)


def test_a_link_takes_the_published_file_s_record(tmp_path: Path) -> None:
    store, made = tmp_path / "store", tmp_path / "made"
    for folder in (store, made):
        folder.mkdir()
    (store / "weights").write_bytes(b"one")
    (store / "grown").write_bytes(b"two and more")
    for name in ("weights", "grown"):
        os.link(store / name, made / name)
    (made / "copied").write_bytes(b"one")
    remember_links(made, [(store / "weights", 3, TOLD), (store / "grown", 3, TOLD)])
    assert set(known_below(made)) == {"weights"}, "a copy is no link, and the other is not what was published"
    assert file_records(made, known_below(made))["weights"].sha256 == TOLD
