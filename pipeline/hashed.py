"""Files whose sha256 this process knows without reading them: it wrote them, checked them, or found them linked to published ones.

    a file is closed -> remember(file, sha256) -> response.json -> artifact.json, if the file is untouched since

Untouched is a file that has kept its stamp: size, modification time, change time and inode. Anything else is hashed by reading it.
What the disk holds is another question, which only reading answers.
"""

from collections.abc import Iterable
from pathlib import Path

from pipeline.layout import Frozen
from pipeline.remembered import Stamp, stamp


class Hashed(Frozen):
    """`damaged` names the tensors in it that hold nan or inf."""

    sha256: str
    stamp: Stamp
    damaged: tuple[str, ...] = ()


_known: dict[Path, Hashed] = {}


def remember(file: Path, sha256: str, damaged: Iterable[str] = ()) -> Hashed:
    """Of a file that is closed and has its final name: a rename is a change too."""
    hashed = Hashed(sha256=sha256, stamp=stamp(file), damaged=tuple(damaged))
    _known[file.resolve()] = hashed
    return hashed


def known(file: Path) -> Hashed | None:
    """None where it was never remembered, or is another file or content by now."""
    hashed = _known.get(file.resolve())
    return hashed if hashed and hashed.stamp == stamp(file) else None


def known_below(folder: Path) -> dict[str, Hashed]:
    """By path relative to `folder`."""
    found = ((file, known(file)) for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashed for file, hashed in found if hashed}


def remember_links(folder: Path, published: Iterable[tuple[Path, int, str]]) -> None:
    """Files below `folder` that are hard links to `published` ones, given with their recorded size and sha256.

    Every checkpoint was searched for nan and inf before it was published, so these are not damaged.
    """
    records: dict[tuple[int, int, int], str] = {}
    for file, nbytes, sha256 in published:
        status = file.stat()
        records[status.st_dev, status.st_ino, nbytes] = sha256
    for file in folder.rglob("*") if records else ():
        status = file.stat()
        if status.st_nlink > 1 and (digest := records.get((status.st_dev, status.st_ino, status.st_size))):
            remember(file, digest)
