"""Planned beside measured: one sentence for the terminal, every figure as a table for MLflow.

    planned  bytes exact; memory 0.85 to 1.1 of planned (highest: distill 1.2 GB of 1.1 GB); time 1.4x planned

The sentence is about the stages that this run executed and about what is known of them: a machine whose peak is not stated has no
planned times, and a stage that was planned for a GPU and ran on a CPU, or the other way round, says nothing of its plan's memory and
time. A plan does not count libraries, so measured RAM is what came on top of those that were loaded before the stage began. The
table has every stage of the graph; of a hit, it holds what was measured when it was computed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.report import Report, StageReport
from pipeline.target import format_size

COLUMNS = ("stage", "bytes planned", "bytes", "peak planned", "peak", "seconds planned", "seconds")

# The least that is compared, as planned. Imports of the stage's own are in what is measured (llm-compressor: 120 MB, seconds), and so is
# library code that a forked worker maps when it first calls it (torch and transformers: up to 140 MB).
SMALLEST_PEAK = 100_000_000  # bytes
SHORTEST = 1.0  # seconds


class Peak(NamedTuple):
    """Bytes of RAM or of VRAM."""

    stage: str
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.measured / self.planned


def comparison(report: Report) -> str:
    """The sentence; empty where nothing ran or nothing is known."""
    ran = [stage for stage in report.stages if stage.status == "ran"]
    return "; ".join(filter(None, (_bytes(ran), _memory(ran), _time(ran))))


def _bytes(stages: Sequence[StageReport]) -> str:
    checkpoints = [stage for stage in stages if stage.planned_bytes is not None]
    wrong = [f"{s.name} {s.bytes:,} instead of {s.planned_bytes:,}" for s in checkpoints if s.bytes != s.planned_bytes]
    return f"bytes differ: {', '.join(wrong)}" if wrong else "bytes exact" if checkpoints else ""


def _memory(stages: Sequence[StageReport]) -> str:
    peaks = sorted((peak for stage in stages for peak in _peaks(stage)), key=lambda peak: peak.ratio)
    if not peaks:
        return ""
    low, high = _ratio(peaks[0].ratio), _ratio(peaks[-1].ratio)
    stage, planned, measured = peaks[-1]
    example = f"{stage} {format_size(measured)} of {format_size(planned)}"
    return f"memory {low} to {high} of planned (highest: {example})" if low != high else f"memory {high} of planned ({example})"


def _peaks(stage: StageReport) -> Iterator[Peak]:
    """Those of the stage that can be compared."""
    measured = {"ram": stage.measured_ram, "vram": stage.measured_peak_vram}
    for place, found in measured.items():
        planned = stage.planned_peak.get(place, 0)
        if _ran_as_planned(stage) and found is not None and planned >= SMALLEST_PEAK:
            yield Peak(stage.name, planned, found)


def _ran_as_planned(stage: StageReport) -> bool:
    """Whether it used a GPU where the plan says so, and only there."""
    return bool(stage.planned_peak.get("vram")) == bool(stage.measured_peak_vram)


def _time(stages: Sequence[StageReport]) -> str:
    known = [stage for stage in stages if (stage.planned_seconds or 0) > SHORTEST and _ran_as_planned(stage)]
    planned = sum(stage.planned_seconds or 0 for stage in known)
    took = sum(stage.seconds or 0 for stage in known)
    return f"time {_ratio(took / planned)}x planned" if planned else ""


def _ratio(value: float) -> str:
    """Two significant digits, never in powers of ten: `0.85`, `1.1`, `140`."""
    return f"{value:.2g}" if 0.01 <= value < 99.5 else f"{value:.0f}" if value >= 1 else "less than 0.01"


def comparison_rows(report: Report) -> list[tuple[str, ...]]:
    """The cells of every stage under COLUMNS; what does not apply or is not known is an empty one."""
    return [
        (
            f"{stage.name} (hit)" if stage.status == "hit" else stage.name,
            _count(stage.planned_bytes),
            _count(stage.bytes),
            _places(stage.planned_peak.get("ram"), stage.planned_peak.get("vram")),
            _places(stage.measured_ram, stage.measured_peak_vram),
            _seconds(stage.planned_seconds),
            _seconds(stage.seconds),
        )
        for stage in report.stages
    ]


def _count(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes:,}"


def _places(ram: int | None, vram: int | None) -> str:
    """`1.2 GB RAM, 3.4 GB VRAM`; of a stage without a GPU the first alone."""
    known = [(ram, "RAM")] if ram is not None else []
    known += [(vram, "VRAM")] if vram else []
    return ", ".join(f"{format_size(nbytes)} {place}" for nbytes, place in known)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.1f}" if seconds >= 10 else f"{seconds:.2g}"
