"""What a stage needs and what a machine has: `Memory`, itemised, and `Target`.

    Target(name="pair", gpus=2, memory="80GiB", flops="312TFLOP/s", bandwidth="2039GB/s", price=10)

`conf/target/` holds the machines that llmpress knows. Each file names every field, so that each can be overridden: `target.price=4`.
"""

import os
import re
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

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


def parse_bandwidth(value: Any) -> Any:
    """Bytes per second from `2039GB/s` or a plain number."""
    if not isinstance(value, str):
        return value
    try:
        return float(parse_size(value.strip().removesuffix("/s")))
    except ValueError:
        raise ValueError("write for example 2039GB/s") from None


def parse_flops(value: Any) -> Any:
    """FLOP/s from `312TFLOP/s`, `312 TFLOPS` or a plain number."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([\d.]+)\s*([kMGTP]?)FLOP(?:S|s|/s)\s*", value)
    try:
        return float(match[1]) * 1000.0 ** " kMGTP".index(match[2] or " ") if match else float(value)
    except ValueError:
        raise ValueError("write for example 312TFLOP/s") from None


def parse_day(value: str) -> str:
    """The same, if it is a day such as `2026-11-21`."""
    try:
        date.fromisoformat(value)
    except ValueError:
        raise ValueError("write a day such as 2026-11-21") from None
    return value


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
Bandwidth = Annotated[float, BeforeValidator(parse_bandwidth)]
Flops = Annotated[float, BeforeValidator(parse_flops)]
Day = Annotated[str, AfterValidator(parse_day)]


class Memory(Frozen):
    """A stage's peak need in bytes, each place a sum of named items."""

    ram: dict[str, int] = {}
    vram: dict[str, int] = {}
    disk: dict[str, int] = {}

    @property
    def totals(self) -> dict[str, int]:
        return {place: sum(getattr(self, place).values()) for place in ("ram", "vram", "disk")}


class Target(Frozen):
    """The machine that must serve the result. What is None is not known, and neither is what would follow from it.

    `memory`, `flops`, `bandwidth` and `reserve` are those of one GPU, or of the processor where `gpus` is 0. `price` is a round
    figure with the day it was written down and where it is from: give these two with a price of your own.
    A target called `host` is this machine: its `ram` and `cores` are detected where they are not given, and where it has no GPU, what it
    computes a second is measured when a plan needs it (pipeline/rates.py).
    """

    name: str
    gpus: int = Field(default=0, ge=0)
    memory: Size | None = Field(default=None, gt=0)  # bytes, as the driver reports them
    ram: Size | None = Field(default=None, gt=0)
    cores: int | None = Field(default=None, ge=1)
    unified: bool = False  # CPU and GPU share one memory: `memory` is the part of `ram` that the GPU may take
    compute_capability: float | None = Field(default=None, gt=0)  # NVIDIA's number for what a GPU can do; None: 8.0 or later
    flops: Flops | None = Field(default=None, gt=0)  # FLOP/s in bf16, dense (data sheets like to print twice that, for sparse matrices)
    float32_flops: Flops | None = Field(default=None, gt=0)  # FLOP/s in float32; None: a usual share of `flops` (pipeline/roofline.py)
    bandwidth: Bandwidth | None = Field(default=None, gt=0)  # bytes per second between a processor and its memory
    core_speed: float | None = Field(default=None, gt=0)  # of a core at what is no matrix product; 1: of that which stages' figures are of
    disk_bandwidth: Bandwidth = Field(default=1e9, gt=0)  # bytes per second of its files: assumed; an NVMe disk has 2 to 7 GB/s
    reserve: Size | None = Field(default=None, ge=0)  # bytes that the engine keeps from weights and cache; None: see `kept`
    price: float | None = Field(default=None, ge=0)  # dollars per hour, all GPUs together
    price_date: Day | None = None
    price_source: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _detect_host(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or content.get("name") != "host":
            return content
        found = {"ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "cores": os.cpu_count()}
        return {**content, **{field: value for field, value in found.items() if content.get(field) is None}}

    @model_validator(mode="after")
    def _memory_has_an_owner(self) -> "Target":
        if self.memory and not self.gpus:
            raise ValueError("memory is that of a GPU and there is none; write gpus: 1, or ram for a machine without one")
        if self.unified and self.memory and self.ram and self.memory > self.ram:
            raise ValueError("the GPU shares the RAM (unified) and has more memory than there is RAM; write a smaller memory")
        return self

    @classmethod
    def host(cls) -> "Target":
        """This machine, as the operating system describes it."""
        return cls(name="host")

    @property
    def cuda(self) -> bool:
        """Whether stages compute on a GPU there: they use CUDA or the CPU, so that of a unified memory they use the CPU's side."""
        return self.gpus > 0 and not self.unified

    def here(self) -> "Target":
        """As it is when this machine turns out to be the one: RAM and cores are detected where they are not given."""
        found = Target.host()
        return self.model_copy(update={"ram": self.ram or found.ram, "cores": self.cores or found.cores})

    def without_gpus(self) -> "Target":
        """What computes there beside the GPUs: of a machine that has some, neither FLOP/s nor bandwidth are known."""
        return (
            self.model_copy(update={"gpus": 0, "memory": None, "flops": None, "float32_flops": None, "bandwidth": None})
            if self.gpus
            else self
        )

    @property
    def devices(self) -> int:
        """Over how many processors a served model is split: the GPUs, else the one host."""
        return max(self.gpus, 1)

    @property
    def room(self) -> int | None:
        """Bytes of memory of each of the `devices`."""
        return self.memory if self.gpus else self.ram

    @property
    def kept(self) -> int:
        """Bytes of each device that are for neither weights nor KV cache: `reserve`, else 2 GiB and a tenth of the memory.

        The tenth is what vLLM leaves alone unless told otherwise (gpu_memory_utilization 0.9, in later versions 0.92), so that a model
        which fits is one that it serves without flags; of a unified memory, the system has had its part already. The 2 GiB are for
        the engine's context and graphs and for the activations of a prefill chunk.
        """
        if self.reserve is not None:
            return self.reserve
        return 2 * 2**30 + (0 if self.unified else (self.room or 0) // 10)


def has_gpu() -> bool:
    """Whether a driver for a GPU that PyTorch could use (NVIDIA's, AMD's, or Windows' under WSL) is loaded here; asks no library."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
