"""What each stage cost in each position: whether it is cheaper or does less harm as the first thing done to a model, or later.

Positions count the stages that make a model. A conversion back to dense weights (`dequantize`) is none of them: it changes no weight's
value, and stands in the way of seeing what the stage behind it did. A model that was measured in one job is known in all that share it:
where a sweep has jobs that end after `prune` and after `prune>distill`, it is known what `distill` did there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.layout import Frozen
from pipeline.report import StageReport
from pipeline.sweep.results import Result, ended_well
from pipeline.waterfall import SOURCE

CONVERSION = "dequantize"
Perplexities = Mapping[str, Mapping[str, float]]  # by the way it was measured, then by the key of what made the model


class PositionCost(Frozen):
    """A stage in one position, over all jobs; each execution counts once, however many jobs share it."""

    stage: str  # its name in the recipe, with the stage behind the name where pipelines differ in that
    position: int  # 1: the first
    executions: int
    seconds: float  # mean
    measured: int  # executions whose model was measured, and the one before it
    change_pct: float | None  # of perplexity, mean over these, percent


class _Placed(NamedTuple):
    """An execution: the key of what made the model before it is SOURCE for the source model."""

    position: int
    stage: StageReport
    before: str


def position_costs(results: Sequence[Result]) -> tuple[PositionCost, ...]:
    """By stage as they first occur, then by position."""
    known, placed = _perplexities(results), [one for result in results for one in _placed(result)]
    behind: dict[str, set[str]] = {}
    for one in placed:
        behind.setdefault(_name(one), set()).add(one.stage.stage)
    found: dict[str, dict[int, dict[str, _Placed]]] = {}  # by label, position and key
    for one in placed:
        label = _name(one) if len(behind[_name(one)]) == 1 else f"{_name(one)} ({one.stage.stage})"
        found.setdefault(label, {}).setdefault(one.position, {}).setdefault(one.stage.key, one)
    return tuple(
        _cost(label, position, list(by_key.values()), known)
        for label, by_position in found.items()
        for position, by_key in sorted(by_position.items())
    )


def _placed(result: Result) -> Iterator[_Placed]:
    before = SOURCE
    made = [stage for stage in result.report.stages if stage.planned_bytes is not None and stage.stage != CONVERSION]
    for position, stage in enumerate(made, 1):
        if ended_well(stage):
            yield _Placed(position, stage, before)
        before = stage.key


def _perplexities(results: Sequence[Result]) -> Perplexities:
    """Ways are told apart by the key of what measured the source model that way; the one that measured most models comes first."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        stages = {stage.name: stage for stage in result.report.stages}
        for stage in stages.values():
            if stage.measures is None or "perplexity" not in stage.metrics:
                continue
            made = stages.get(stage.measures.partition(".")[0])
            way = stages[stage.reference].key if stage.reference in stages else stage.key if stage.measures == SOURCE else stage.stage
            found.setdefault(way, {})[made.key if made else SOURCE] = stage.metrics["perplexity"]
    return dict(sorted(found.items(), key=lambda way: -len(way[1])))


def _cost(label: str, position: int, placed: Sequence[_Placed], known: Perplexities) -> PositionCost:
    seconds = [one.stage.seconds or 0.0 for one in placed]
    changes = [change for one in placed if (change := _change(one, known)) is not None]
    return PositionCost(
        stage=label,
        position=position,
        executions=len(placed),
        seconds=round(sum(seconds) / len(seconds), 3),
        measured=len(changes),
        change_pct=sum(changes) / len(changes) if changes else None,
    )


def _change(placed: _Placed, known: Perplexities) -> float | None:
    """In percent, by the first way that measured both."""
    both = (of for of in known.values() if placed.before in of and placed.stage.key in of)
    return next((100 * (of[placed.stage.key] / of[placed.before] - 1) for of in both), None)


def _name(placed: _Placed) -> str:
    return placed.stage.name.partition("@")[0]
