"""`verdict.json`: what a gate found, with the sum that it comes from. Written by stage `gate`, read by the executor and the report."""

from pathlib import Path
from typing import Literal

from pipeline.layout import Frozen

VERDICT_FILE = "verdict.json"
Outcome = Literal["pass", "fail", "inconclusive"]


class VerdictFile(Frozen):
    """`change` is the metric's change, or the metric itself, in the unit of the limit; `low` and `high` are the ends of its interval.

    `low` and `high` are None of a figure that is known as one number only. `needed`, of an inconclusive one, is how many samples would
    decide if the difference is what it seems to be.
    """

    outcome: Outcome
    metric: str
    limit_name: str  # such as max_increase_pct
    limit: float
    value: float  # of the measured model
    source_value: float | None  # of the source model; None where the limit is absolute
    change: float
    low: float | None
    high: float | None
    confidence: float
    samples: int
    noun: str  # what the samples are: documents or items; empty of one number
    needed: int | None

    @classmethod
    def load(cls, folder: Path) -> "VerdictFile":
        """Of a gate's output folder. ValueError (pydantic's) where the file is something else, OSError where there is none."""
        return cls.model_validate_json((folder / VERDICT_FILE).read_bytes())

    def write(self, folder: Path) -> None:
        (folder / VERDICT_FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @property
    def sentence(self) -> str:
        """`gate fails: perplexity changed by +9.0 % [+8.1, +9.9] at 95% over 55 documents, allowed is an increase of at most 5 %`."""
        verdict = {"pass": "passes", "fail": "fails", "inconclusive": "is inconclusive"}[self.outcome]
        more = f"; about {self.needed:,} would decide" if self.needed else ""
        kind, _, scale = self.limit_name.rpartition("_")
        falls, sign, unit = kind == "max_drop", "+" if kind else "", {"pct": " %", "points": " points"}.get(scale, "")
        found, low, high = self.change, self.low, self.high
        if falls:
            found, low, high = -found, None if high is None else -high, None if low is None else -low
        shown = f"{found:{sign}.3g}{unit}"
        if low is not None and high is not None:
            shown += f" [{low:{sign}.3g}, {high:{sign}.3g}] at {self.confidence:.0%} over {self.samples:,} {self.noun}"
        if kind:
            allowed = f"{'a drop' if falls else 'an increase'} of at most {self.limit:g}{unit}"
            return f"gate {verdict}: {self.metric} changed by {shown}, allowed is {allowed}{more}"
        bound = "at least" if self.limit_name == "min" else "at most"
        return f"gate {verdict}: {self.metric} is {shown}, allowed is {bound} {self.limit:g}{more}"
