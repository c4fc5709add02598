"""What a stage needs and what a machine has: `Memory`, itemised, and `Target`."""

import os
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from pipeline.layout import Frozen

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(value: Any) -> Any:
    """Bytes from `80GiB`, `1.5 GB` or a plain number; anything else is left for pydantic to refuse."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgGtT]?i?[bB]?)\s*", value) if isinstance(value, str) else None
    if not match:
        return value
    unit = match[2].upper()
    if unit and not unit.endswith("B"):
        unit += "B"
    try:
        return int(float(match[1]) * UNITS[unit])
    except (KeyError, ValueError):
        raise ValueError(f"'{value}' is not a size; write for example 80GiB") from None


def format_size(count: float) -> str:
    """`9.97 MB`: decimal units, three significant digits, as files are commonly listed."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """`4.2 s` below a minute, then `1:02`, then `1:01:02`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


Size = Annotated[int, BeforeValidator(parse_size)]


class Memory(Frozen):
    """A stage's peak need in bytes, each place a sum of named items."""

    ram: dict[str, int] = {}
    vram: dict[str, int] = {}
    disk: dict[str, int] = {}

    @property
    def totals(self) -> dict[str, int]:
        return {place: sum(getattr(self, place).values()) for place in ("ram", "vram", "disk")}


class Target(Frozen):
    """The machine that must serve the result. `memory` and `gpus` are empty for a machine without an accelerator."""

    name: str
    gpus: int = 0
    memory: Size | None = None  # bytes of one GPU, as its driver reports them
    ram: Size | None = None

    @classmethod
    def host(cls) -> "Target":
        """This machine, as the operating system describes it."""
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(name="host", ram=ram)


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
