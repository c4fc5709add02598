"""What a benchmark measured, as flat metrics, as one sentence and as `benchmark.json`. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.machine import fingerprint
from pipeline.target import format_size
from stages.runtime.speed_bounds import Bounds, Load, Peaks


@dataclass(frozen=True)
class Timing:
    """One load: seconds of every repeat, and bytes of the KV cache at its longest (None: the engine does not say)."""

    load: Load
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    cache_bytes: int | None

    def metrics(self) -> dict[str, float]:
        """ValueError where decoding took no time, as can be seen with an engine that times it as a difference."""
        prefill, decode = median(self.prefill_seconds), median(self.decode_seconds)
        if decode <= 0:
            raise ValueError(
                f"new_tokens: decoding {self.load.new_tokens} tokens takes less time than the measurement scatters; write more"
            )
        found = {
            "prefill_tokens_per_second": self.load.batch * self.load.prompt_tokens / prefill,
            "prefill_spread": spread(self.prefill_seconds),
            "decode_tokens_per_second": self.load.batch * (self.load.new_tokens - 1) / decode,
            "decode_spread": spread(self.decode_seconds),
        }
        return found | ({} if self.cache_bytes is None else {"cache_bytes": float(self.cache_bytes)})


def spread(seconds: tuple[float, ...]) -> float:
    """(largest - smallest) / median."""
    return (max(seconds) - min(seconds)) / median(seconds)


@dataclass(frozen=True)
class Measured:
    """Everything about one engine. `bounds` are by batch size; memory is in bytes, None where it is not known or there is no GPU."""

    engine: str
    device: str
    threads: int
    dtype: str
    kv_cache: str | None  # mode of the INT8 cache; None: in the model's dtype
    load_seconds: float
    weights_bytes: int | None
    peak_ram: int | None
    peak_vram: int | None
    peaks: Peaks
    timings: tuple[Timing, ...]
    bounds: Mapping[int, Bounds]

    def metrics(self) -> dict[str, float]:
        """Flat; those of a batch size end in `_b<size>`."""
        memory = {"weights_bytes": self.weights_bytes, "peak_ram": self.peak_ram, "peak_vram": self.peak_vram}
        found = {"load_seconds": self.load_seconds, "threads": float(self.threads), **self.peaks._asdict()}
        found |= {name: float(count) for name, count in memory.items() if count is not None}
        for timing in self.timings:
            bound = self.bounds[timing.load.batch]
            at_most = {"prefill_bound_tokens_per_second": bound.prefill, "decode_bound_tokens_per_second": bound.decode}
            found |= {f"{name}_b{timing.load.batch}": value for name, value in (timing.metrics() | at_most).items()}
        return found

    def sentence(self) -> str:
        """`transformers, on cpu (2 threads): batch 1 reads 5,100 and decodes 210 tokens/s (spread 3 %, at most 460), ...`"""
        speeds = []
        for timing in self.timings:
            found, bound = timing.metrics(), self.bounds[timing.load.batch]
            speeds.append(
                f"batch {timing.load.batch} reads {found['prefill_tokens_per_second']:,.0f} and decodes "
                f"{found['decode_tokens_per_second']:,.0f} tokens/s (spread "
                f"{100 * found['decode_spread']:.0f} %, at most {bound.decode:,.0f})"
            )
        memory = [(self.peak_ram, "RAM"), (self.peak_vram, "VRAM")]
        peaks = [f"{format_size(count)} of {place}" for count, place in memory if count is not None]
        where = f"{self.device} ({self.threads} thread{'s' if self.threads > 1 else ''})"
        return f"{self.engine}, on {where}: {', '.join(speeds)}; loaded in {self.load_seconds:.1f} s; peak {' and '.join(peaks)}"

    def write(self, folder: Path) -> None:
        """`benchmark.json`: {"metrics", "machine", "engine", "device", "threads", "dtype", "kv_cache", "batches": [{"load":
        {"batch", "prompt_tokens", "new_tokens"}, "prefill_seconds" (all repeats), "decode_seconds", "cache_bytes"}]}.
        """
        content: dict[str, Any] = {"metrics": self.metrics(), "machine": fingerprint()}
        content |= {name: getattr(self, name) for name in ("engine", "device", "threads", "dtype", "kv_cache")}
        content["batches"] = [asdict(timing) | {"load": timing.load._asdict()} for timing in self.timings]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
