"""`mode=gc`: remove what no run uses.

Every run folder's `plan.json` pins the artifacts of its nodes, and its `model` link the final one. So disk is freed in two moves a
person understands: delete the run folders you no longer want (`outputs/runs/<recipe>/<digest>`), then `run mode=gc`. Nothing pins what
only spares others work, stored hidden states: a run that is finished does without, and another one makes them again. Only folders
that are named as the store names them are touched, only below a folder that llmpress made, and only while no run is going on.
"""

import json
import os
import re
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import DERIVED
from pipeline.envs import current_folders
from pipeline.errors import StoreError
from pipeline.store import MARKER, SHORT, Store

ARTIFACT = re.compile(r"\w+-([0-9a-f]{12})")
SCRATCH = re.compile(r"([0-9a-f]{12})(-[0-9a-f]{8})?")


@dataclass(frozen=True)
class Collected:
    """What was removed and the bytes that this freed; how many artifacts stay; and for each run the bytes that it alone keeps."""

    removed: tuple[Path, ...]
    nbytes: int
    kept: int
    held: dict[Path, int]


@contextmanager
def using(store: Store) -> Iterator[None]:
    """Held by a run from before it plans until it ends: nothing is collected meanwhile, and it waits for a collection to end."""
    mine = f"run-{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # a folder may be shared
    with ExitStack() as held:
        with store.claims.hold("gc"):
            held.enter_context(store.claims.announce(mine))
        yield


def collect(store: Store) -> Collected:
    """Remove unpinned artifacts, abandoned scratch folders and environments of other locks than today's.

    StoreError where that could take something that is used.
    """
    if not (store.root / MARKER).is_file():
        raise StoreError(f"{store.root} is not an outputs folder of llmpress; name the right one with `outputs=...`")
    with store.claims.hold("gc"):
        _check_no_run(store)
        pins = pinned_keys(store.root)
        pinned = frozenset[str]().union(*pins.values())
        artifacts = _folders(store.root / "store", ARTIFACT)
        unused = [folder for folder in artifacts if folder.name.rpartition("-")[2] not in pinned]
        abandoned = [folder for folder in _folders(store.root / "scratch", SCRATCH) if folder.name[:SHORT] not in pinned]
        outdated = [folder for folder in _folders(store.root / "envs", SCRATCH) if folder.name not in current_folders()]
        removed = (*unused, *abandoned, *outdated)  # scratch that some run's plan names may be resumed
        nbytes = 0
        for folder in removed:
            nbytes += _size(folder)
            shutil.rmtree(folder)
        for record in (store.root / "scratch").glob("*.json"):  # of attempts whose files are published or gone
            if SCRATCH.fullmatch(record.stem) and not any(folder.is_dir() for folder in record.parent.glob(f"{record.stem}*")):
                record.unlink()
        kept = [folder for folder in artifacts if folder not in unused]
    return Collected(removed, nbytes, len(kept), _held_alone(kept, pins))


def pinned_keys(root: Path) -> dict[Path, set[str]]:
    """By run folder the short keys of every node of its plan but what is derived, and of what its `model` points to."""
    pinned: defaultdict[Path, set[str]] = defaultdict(set)
    for file in sorted(root.glob("runs/*/*/plan.json")):
        try:
            nodes = json.loads(file.read_text())["nodes"]
            kept = (node for node in nodes if not {output["type"] for output in node["outputs"].values()} <= DERIVED)
            pinned[file.parent] |= {node["key"][:SHORT] for node in kept}
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"{file} is not readable, so what its run uses is unknown; delete that run's folder or restore the file"
            ) from None
    for link in root.glob("runs/*/*/model"):
        parts = link.resolve().relative_to(root.resolve()).parts if link.resolve().is_relative_to(root.resolve()) else ()
        pinned[link.parent] |= {found[1] for part in parts if (found := ARTIFACT.fullmatch(part))}
    return pinned


def _held_alone(artifacts: Iterable[Path], pins: Mapping[Path, set[str]]) -> dict[Path, int]:
    """Bytes of `artifacts` that one run alone pins, by run, the largest first."""
    held: Counter[Path] = Counter()
    for folder in artifacts:
        runs = [run for run, keys in pins.items() if folder.name.rpartition("-")[2] in keys]
        if len(runs) == 1:
            held[runs[0]] += _size(folder)
    return dict(held.most_common())


def _size(folder: Path) -> int:
    """Bytes that removing it frees: of files that have no other name."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.stat().st_nlink == 1)


def _folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    return [folder for folder in sorted(parent.glob("*")) if name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()]


def _check_no_run(store: Store) -> None:
    for name in store.claims.held("run-*"):
        host, number = name.removeprefix("run-").rsplit("-", 2)[:2]
        raise StoreError(f"process {number} of {host} is running a recipe in {store.root}; run mode=gc when it has ended")
