"""What Hydra answered before to the same arguments, so that it need not be imported and asked again.

Composing a config takes longer than everything else that a plan does. It depends on the arguments, on the files of conf/ and recipes/, on
the defaults that the stages' code holds, and on what is installed. An answer is remembered with a mark of all of these (the stamp of every
file, the time of every folder that packages are installed in) and given again while the mark is the same. Where an answer may depend on
more than that, it is not remembered: arguments with a resolver (`$`), Hydra's own settings, stages of other packages.
"""

import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.remembered import Remembered, Stamp, is_settled, stamp
from pipeline.resources import resources

CODE = Path(__file__).parent.parent  # holds pipeline/ and stages/
MOST = 64  # answers of a kind
RECIPE_FILE = re.compile(r"\+*recipe=.*\.ya?ml\b")
SHOWS_HELP = ("--help", "-h")


@dataclass(frozen=True)
class Composed:
    """The config of one run: plain values without Hydra's own. `text` is the same as YAML, for a run; `recipe` None: none is chosen."""

    content: dict[str, Any]
    recipe: str | None
    text: str = ""
    on_other_machines: bool = False  # by a launcher whose jobs share the outputs folder between machines


class Learned:
    """Answers of one kind to arguments that Hydra is given. Made before Hydra is asked: what it read is not older than the mark."""

    def __init__(self, kind: str, arguments: Sequence[str]) -> None:
        self.memory = Remembered(f"{kind}-{zlib.crc32(os.fsencode(CODE)):08x}", MOST)
        self.key = json.dumps(arguments)
        self.eligible = not any("$" in argument or "hydra" in argument for argument in arguments)
        self.mark, self.settled = _mark(_recipe_files(arguments)) if self.eligible else ("", False)

    def recall(self) -> Any | None:
        return self.memory.recall(self.key, self.mark) if self.eligible else None

    def keep(self, answer: Any) -> None:
        """`answer` as JSON gives it back, or it is not kept."""
        if self.eligible and self.settled and json.loads(json.dumps(answer)) == answer:
            self.memory.keep(self.key, self.mark, answer)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether that is all that is asked for."""
    return any(argument in SHOWS_HELP for argument in arguments) and not any(
        argument.startswith("-") and argument not in SHOWS_HELP for argument in arguments
    )


def learned_help(arguments: Sequence[str]) -> Learned:
    return Learned("help", sorted(set(arguments) - set(SHOWS_HELP), key=arguments.index))


def learned_config(arguments: Sequence[str]) -> Learned:
    return Learned("config", arguments)


def recall_config(arguments: Sequence[str]) -> Composed | None:
    """None: it has to be composed."""
    if any(argument.startswith("-") for argument in arguments):
        return None
    found = learned_config(arguments).recall()
    return None if found is None else Composed(**found)


def keep_config(learned: Learned, config: Composed) -> None:
    if not others_stages(config.content):
        learned.keep(asdict(config))


def others_stages(content: dict[str, Any]) -> bool:
    """Whether the config has stages of other packages, whose defaults may be anywhere in their code."""
    from pipeline.stage import BUILT_IN  # imported by now, or else Hydra could not have composed

    stages = content.get("stages")
    named = [entry.get("stage") if isinstance(entry, dict) else entry for entry in stages.values()] if isinstance(stages, dict) else []
    return not all(name in BUILT_IN for name in named)


def _recipe_files(arguments: Sequence[str]) -> Iterator[Path]:
    """Those given as files, whose content is part of the answer."""
    for argument in arguments:
        if RECIPE_FILE.match(argument):
            for part in argument.partition("=")[2].split(","):
                yield Path(part.strip("'\" ")).expanduser().absolute()


def _mark(files: Iterator[Path]) -> tuple[str, bool]:
    """A digest of all that an answer depends on, and whether any later change of it will show."""
    stamps, settled = _installation()
    others: list[tuple[str, Stamp | None]] = []
    for file in files:
        try:
            others.append((str(file), stamp(file)))
        except OSError:
            others.append((str(file), None))
    settled = settled and all(found is None or is_settled(found) for _, found in others)
    return hashlib.sha256(json.dumps([sys.version, stamps, others]).encode()).hexdigest(), settled


@cache
def _installation() -> tuple[list[tuple[str, Stamp]], bool]:
    """Every file that holds code or config of llmpress, and the folders that packages are imported from."""
    folders = (resources() / "conf", resources() / "recipes", CODE / "pipeline", CODE / "stages")
    stamps = [found for folder in folders for found in _stamps(folder)]
    stamps += [(folder, stamp(Path(folder))) for folder in sys.path if os.path.isdir(folder) and Path(folder) != CODE]
    return stamps, all(is_settled(found) for _, found in stamps)


def _stamps(folder: Path | str) -> Iterator[tuple[str, Stamp]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith((".py", ".yaml")):
                yield entry.path, stamp(Path(entry.path))
            elif entry.is_dir() and entry.name != "__pycache__":
                yield from _stamps(entry.path)
