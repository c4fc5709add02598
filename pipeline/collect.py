"""`mode=gc`: remove what no run uses.

Every run folder's `plan.json` pins the artifacts of its nodes. So disk is freed in two moves a person understands: delete the run
folders you no longer want (`outputs/runs/<recipe>/<digest>`), then `run mode=gc`. Scratch of a stage that is running now is kept.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.store import SHORT, Store


@dataclass(frozen=True)
class Collected:
    removed: tuple[Path, ...]
    nbytes: int
    kept: int


def collect(store: Store) -> Collected:
    """Remove unpinned artifacts and abandoned scratch folders. StoreError where a run's plan cannot be read: nothing is guessed."""
    pinned = pinned_keys(store.root)
    artifacts = [folder for folder in sorted((store.root / "store").glob("*-*")) if folder.is_dir()]
    unused = [folder for folder in artifacts if folder.name.rpartition("-")[2] not in pinned]
    abandoned = [folder for folder in sorted((store.root / "scratch").glob("*")) if not _in_use(store, folder.name)]
    nbytes = 0
    for folder in (*unused, *abandoned):
        nbytes += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.stat().st_nlink == 1)
        shutil.rmtree(folder)
    return Collected((*unused, *abandoned), nbytes, len(artifacts) - len(unused))


def pinned_keys(root: Path) -> set[str]:
    """Short keys of every node of every run's plan."""
    pinned = set()
    for file in sorted(root.glob("runs/*/*/plan.json")):
        try:
            pinned |= {node["key"][:SHORT] for node in json.loads(file.read_text())["nodes"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"{file} is not readable, so what its run uses is unknown; delete that run's folder or restore the file"
            ) from None
    return pinned


def _in_use(store: Store, short_key: str) -> bool:
    try:
        with store.lock(short_key, timeout=0):
            return False
    except TimeoutError:
        return True
