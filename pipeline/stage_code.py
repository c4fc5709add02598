"""Which code a stage has: a digest of its module and of the modules of `stages` that it imports, comments and blank lines aside.

Recorded beside results, never hashed into keys: whether a change of code changes results is the author's to say, by raising `version`.
Taking comments out of the sixty modules costs more than all else that a run of hits does, so the digest is remembered with the stamp of
every file that it was made of (pipeline/remembered.py). It is computed again where one of these is another file, has another stamp, or
was changed so recently that a further change might not show.
"""

import ast
import hashlib
import importlib.util
import io
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.identity import canonical
from pipeline.remembered import Remembered, Stamp, is_settled, stamp

MEMORY = Remembered("stage_code")


class Place(NamedTuple):
    """A module's file as it was before it was read: what is remembered of it is never newer than its stamp."""

    file: str
    stamp: Stamp
    settled: bool

    @property
    def known_by(self) -> list[Any]:
        return [self.file, list(self.stamp)]


@cache
def fingerprint(module: str) -> str:
    """Of the stage whose class is in `module`."""
    place = _place(module)
    mark, key = _marks((__name__, module)), place.file if place else module
    kept = MEMORY.recall(key, mark)
    if kept is not None and _marks(kept["modules"]) == kept["modules"]:
        return str(kept["fingerprint"])
    code = _collect(module)
    content = sorted((name, source) for name, source in code.items() if source is not None)
    found = hashlib.sha256(canonical(content).encode()).hexdigest()[:16]
    if all(found_at is None or found_at.settled for found_at in map(_place, (__name__, *code))):
        MEMORY.keep(key, mark, {"modules": _marks(code), "fingerprint": found})
    return found


def _marks(modules: Iterable[str]) -> dict[str, list[Any] | None]:
    return {name: place.known_by if (place := _place(name)) else None for name in modules}


def _collect(module: str) -> dict[str, str | None]:
    """Code by module: of this one, and of those of `stages` that it leads to; None for what has no file."""
    seen: dict[str, str | None] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name], imported = _code(name)
            waiting += imported
    return seen


@cache
def _place(module: str) -> Place | None:
    """None where it has no file."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    found = stamp(Path(spec.origin))
    return Place(spec.origin, found, is_settled(found))


@cache
def _code(module: str) -> tuple[str | None, tuple[str, ...]]:
    """Source of a module without comments, and the modules of `stages` that it imports."""
    place = _place(module)
    if place is None:
        return None, ()
    source = Path(place.file).read_text(encoding="utf-8")
    imports = (node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return _without_comments(source), tuple(name for name in imports if name and name.startswith("stages."))


def _without_comments(source: str) -> str:
    """The same on every Python release, which what `ast` prints is not."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())
