"""What each stage cost: the checkpoints of a run in order, the source model first, each with what measured its perplexity.

Only figures of one text can stand below each other. So of several ways to measure (`evaluate` on everything, `probe` on a slice) the one
that measured most of the checkpoints is taken, the one of more documents where two did; the others' figures stand by themselves.
"""

from typing import NamedTuple

from pipeline.report import Report, StageReport

SOURCE = "model"


class Level(NamedTuple):
    """One checkpoint. `made` is None of the source model, `judge` where nothing of the series measured it."""

    name: str
    made: StageReport | None
    judge: StageReport | None

    @property
    def perplexity(self) -> float | None:
        return self.judge.metrics["perplexity"] if self.judge else None


def waterfall(report: Report) -> list[Level]:
    judges = series(report)
    made = [stage for stage in report.stages if stage.planned_bytes is not None]
    return [Level("source", None, judges.get(SOURCE)), *(Level(stage.name, stage, judges.get(f"{stage.name}.model")) for stage in made)]


def series(report: Report) -> dict[str, StageReport]:
    """The chosen measurements, by the output that they measured, `model` being the source."""
    candidates: dict[str, dict[str, StageReport]] = {}  # by the node that measured the source model that way
    for stage in report.stages:
        if stage.measures is not None and "perplexity" in stage.metrics:
            way = stage.name if stage.measures == SOURCE else stage.reference or stage.stage
            candidates.setdefault(way, {}).setdefault(stage.measures, stage)
    return max(candidates.values(), key=_weight, default={})


def _weight(judges: dict[str, StageReport]) -> tuple[int, float]:
    """Checkpoints made here that it measured, and on how many documents."""
    return sum(output != SOURCE for output in judges), max(judge.metrics.get("documents", 0.0) for judge in judges.values())
