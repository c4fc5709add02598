"""What is published is shared, what a user may still write is copied, and nothing else of a folder comes along."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import linked_folder
from stages.runtime.linked_folder import link_checkpoint
from tests.stages.models import make_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Sharded, with files that are no part of a checkpoint."""
    folder = make_checkpoint(tmp_path / "source", shard_size="60KB")
    (folder / "artifact.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def publish(folder: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o444)


def same_file(one: Path, other: Path) -> bool:
    return one.stat().st_ino == other.stat().st_ino


def test_published_files_are_linked_and_only_those_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    publish(source)
    link_checkpoint(source, tmp_path / "made", without=["generation_config.json"])
    made = {file.name for file in (tmp_path / "made").iterdir()}
    assert made == {file.name for file in source.iterdir()} - {"artifact.json", "modeling.py", "generation_config.json"}
    assert len([name for name in made if name.endswith(".safetensors")]) > 2 and "model.safetensors.index.json" in made
    assert all(same_file(source / name, tmp_path / "made" / name) for name in made)


def test_what_its_owner_may_write_is_copied(source: Path, tmp_path: Path) -> None:
    publish(source)
    (source / "config.json").chmod(0o644)
    (source / "tokenizer.json").chmod(0o400)  # publishing would show it to others
    link_checkpoint(source, tmp_path / "made")
    for name in ("config.json", "tokenizer.json"):
        assert not same_file(source / name, tmp_path / "made" / name)
        assert (source / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    (source / "config.json").write_text(json.dumps({}))
    assert json.loads((tmp_path / "made/config.json").read_text())["model_type"] == "llama"


def test_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    publish(source)
    (tmp_path / "snapshot").mkdir()
    for file in source.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    link_checkpoint(tmp_path / "snapshot", tmp_path / "made")
    made = tmp_path / "made/config.json"
    assert not made.is_symlink() and same_file(made, source / "config.json")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_links_cannot_be_made_files_are_copied(source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    publish(source)
    monkeypatch.setattr(linked_folder.os, "link", refuse)
    link_checkpoint(source, tmp_path / "made")
    assert not same_file(source / "config.json", tmp_path / "made/config.json")
    assert (tmp_path / "made/config.json").stat().st_mode & 0o200


def test_a_full_disk_is_not_taken_for_a_missing_link(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publish(source)
    monkeypatch.setattr(linked_folder.os, "link", fail)
    with pytest.raises(OSError, match="No space left"):
        link_checkpoint(source, tmp_path / "made")
