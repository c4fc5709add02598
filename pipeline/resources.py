"""Where conf/, recipes/ and assets/ are, and the list of recipes. Imports nothing heavy: `run` alone does no more than print that list."""

import re
from functools import cache
from itertools import takewhile
from pathlib import Path


@cache
def resources() -> Path:
    """The folder that holds conf/, recipes/ and assets/: the checkout, or the copy inside an installed package."""
    installed = Path(__file__).parent / "resources"
    return installed if installed.is_dir() else Path(__file__).parent.parent


def recipe_files() -> list[Path]:
    return sorted((resources() / "recipes").glob("*.yaml"))


def recipe_list() -> str:
    """Every recipe with the first sentence of its file."""
    rows = [(file.stem, _title(file)) for file in recipe_files()]
    width = max(len(name) for name, _ in rows)
    listed = "\n".join(f"  {name:<{width}}  {title}" for name, title in rows)
    return f"Recipes (run recipe=<name>, or recipe=path/to/file.yaml):\n\n{listed}\n\n`run --help` shows what can be set."


def _title(file: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.lstrip("# ") for line in lines), maxsplit=1)[0]
