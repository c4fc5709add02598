"""The rows of a sweep's ranking: pipelines, each with what it came to, and which of them to take.

Jobs that differ only in seeds are one row. Only what was measured alike can be ranked together: of several groups the largest is.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from pydantic import JsonValue

from pipeline.findings import Decision
from pipeline.layout import Frozen
from pipeline.store import SHORT
from pipeline.sweep.ranking import Change, Scores, Standing, standings
from pipeline.sweep.record import JobRecord
from pipeline.sweep.results import Result

WORST_FIRST: tuple[Decision | None, ...] = ("investigate", "inconclusive", None, "deploy")  # of several runs


class SeedRun(Frozen):
    """One job of a row."""

    digest: str
    seeds: dict[str, JsonValue]  # those in which jobs of the sweep differ, by name
    perplexity: float | None
    cost_seconds: float
    decision: Decision | None
    command: str
    folder: str


class Row(Frozen):
    """One pipeline. Means over its runs; `command` and `folder` are of its first."""

    rank: int | None  # None: it cannot be ranked with the others
    label: str  # the name, with what tells it from others of that name
    name: str
    order: tuple[str, ...]
    params: dict[str, JsonValue]  # in which pipelines of the sweep differ
    runs: tuple[SeedRun, ...]  # one for each seed
    perplexity: float | None
    vs_source: Change | None
    vs_best: Change | None  # None: it is the best, or nothing was measured
    tie: bool  # with the best, which is none itself
    nbytes: int
    bits_per_weight: float
    cost_seconds: float  # of the distinct executions that made it, as long as they took when they were computed
    measuring_seconds: float
    decision: Decision | None  # `deploy` only where every run says so
    pareto: bool  # no other ranked pipeline is as small and as good, and better in one of them
    command: str
    folder: str


class Pipeline(NamedTuple):
    """The jobs of one row, and of them those that count: that were measured the same way."""

    results: list[Result]
    counted: list[Result]

    @property
    def name(self) -> str:
        return self.results[0].record.name

    @property
    def yardstick(self) -> str:
        """Empty where nothing measured the perplexity of the final model."""
        return self.counted[0].yardstick


def pipelines_of(results: Iterable[Result]) -> list[Pipeline]:
    """Of the jobs whose final model was made."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.has_model:
            groups.setdefault(result.identity, []).append(result)
    return [Pipeline(group, _alike(group)) for group in groups.values()]


def comparable(pipelines: Sequence[Pipeline], notes: list[str]) -> tuple[list[Pipeline], list[Pipeline]]:
    """The largest group that was measured the same way, or all where nothing was measured; and the others, with a note why."""
    sizes = Counter(pipeline.yardstick for pipeline in pipelines if pipeline.yardstick)
    largest = max(sizes, key=sizes.__getitem__, default="")
    others = [pipeline for pipeline in pipelines if pipeline.yardstick != largest]
    unmeasured = [pipeline.name for pipeline in others if not pipeline.yardstick]
    otherwise = [pipeline.name for pipeline in others if pipeline.yardstick]
    if unmeasured:
        notes.append(f"not ranked, since nothing measured the perplexity of its final model: {', '.join(unmeasured)}")
    if otherwise:
        notes.append(
            "not ranked with the others, since it was measured on other documents, with another tokenizer or with other settings of the "
            f"evaluation: {', '.join(otherwise)}"
        )
    return [pipeline for pipeline in pipelines if pipeline.yardstick == largest], others


def ranked_rows(chosen: Sequence[Pipeline], others: Sequence[Pipeline]) -> tuple[Row, ...]:
    """The chosen first, by perplexity, or by size where they were not measured; then the others as they come."""
    pipelines = [*chosen, *others]
    facts = _differing([pipeline.results[0].facts for pipeline in pipelines])
    seeds = _differing([result.seeds for pipeline in pipelines for result in pipeline.results])
    rows = [
        _row(pipeline, standing, facts, seeds)
        for pipeline, standing in zip(pipelines, [*_standings(chosen), *map(_standing, others)], strict=True)
    ]
    rows = _labelled(rows)
    among = sorted(rows[: len(chosen)], key=lambda row: (row.perplexity or 0.0, row.nbytes))
    ranked = [row.model_copy(update={"rank": rank, "pareto": _on_front(row, among)}) for rank, row in enumerate(among, 1)]
    return (*ranked, *rows[len(chosen) :])


def command_of(record: JobRecord) -> str:
    """What runs just this job."""
    return shlex.join(["run", *record.overrides])


def _alike(results: Sequence[Result]) -> list[Result]:
    """Those with the yardstick that most of them have."""
    most = Counter(result.yardstick for result in results).most_common(1)[0][0]
    return [result for result in results if result.yardstick == most]


def _standings(chosen: Sequence[Pipeline]) -> list[Standing]:
    """With intervals where there are two documents at least."""
    documents = chosen[0].counted[0].documents if chosen else ()
    if len(documents) > 1:
        return standings([_scores(pipeline) for pipeline in chosen], [document.tokens for document in documents])
    alone = [_standing(pipeline) for pipeline in chosen]
    best = min((one.perplexity for one in alone if one.perplexity is not None), default=None)
    return [
        one if best is None or one.perplexity in (None, best) else one._replace(vs_best=Change(percent=100 * (one.perplexity / best - 1)))
        for one in alone
    ]


def _scores(pipeline: Pipeline) -> Scores:
    source = [document.reference_nll for document in pipeline.counted[0].documents]
    known = [nll for nll in source if nll is not None]
    nll = [[document.nll for document in result.documents] for result in pipeline.counted]
    return Scores(nll, known if len(known) == len(source) else None)


def _standing(pipeline: Pipeline) -> Standing:
    """Of one that is not ranked by documents: its own figures, without intervals."""
    judges = [judge.metrics for result in pipeline.counted if (judge := result.judge)]
    if not judges:
        return Standing(None, None, None)
    nats = fmean(math.log(metrics["perplexity"]) for metrics in judges)
    sources = [math.log(metrics["reference_perplexity"]) for metrics in judges if "reference_perplexity" in metrics]
    change = Change(percent=100 * math.expm1(nats - fmean(sources))) if len(sources) == len(judges) else None
    return Standing(math.exp(nats), None, change)


def _differing(choices: Sequence[dict[str, JsonValue]]) -> list[str]:
    """The names under which not all that have them have the same."""
    names = dict.fromkeys(name for chosen in choices for name in chosen)
    return [name for name in names if any(chosen[name] != other[name] for chosen, other in pairwise([c for c in choices if name in c]))]


def _row(pipeline: Pipeline, standing: Standing, facts: Sequence[str], seeds: Sequence[str]) -> Row:
    first, results = pipeline.results[0], pipeline.results
    runs = tuple(_seed_run(result, seeds) for result in results)
    decisions = {run.decision for run in runs}
    return Row(
        rank=None,
        label=pipeline.name,
        name=pipeline.name,
        order=first.report.order,
        params={name: first.facts[name] for name in facts if name in first.facts},
        runs=runs,
        perplexity=standing.perplexity,
        vs_source=standing.vs_source,
        vs_best=standing.vs_best,
        tie=standing.vs_best is not None and standing.vs_best.is_tie,
        nbytes=round(fmean(result.nbytes for result in results)),
        bits_per_weight=round(fmean(result.bits_per_weight for result in results), 4),
        cost_seconds=round(fmean(result.seconds(measuring=False) for result in results), 3),
        measuring_seconds=round(fmean(result.seconds(measuring=True) for result in results), 3),
        decision=next((decision for decision in WORST_FIRST if decision in decisions), None),
        pareto=False,
        command=runs[0].command,
        folder=runs[0].folder,
    )


def _seed_run(result: Result, seeds: Sequence[str]) -> SeedRun:
    return SeedRun(
        digest=result.record.digest,
        seeds={name: result.seeds[name] for name in seeds if name in result.seeds},
        perplexity=result.perplexity,
        cost_seconds=round(result.seconds(measuring=False), 3),
        decision=result.report.decision,
        command=command_of(result.record),
        folder=result.record.run_dir,
    )


def _labelled(rows: Sequence[Row]) -> list[Row]:
    """Those that share a name told apart: by parameters, by what the recipe calls their stages, else by the digest."""
    labelled = []
    for row in rows:
        same = [other for other in rows if other.name == row.name]
        names = _differing([other.params for other in same])
        told = [f"{name}={json.dumps(row.params[name]).strip(chr(34))}" for name in names if name in row.params]
        if len(same) > 1 and [other.params for other in same].count(row.params) > 1:
            own = [name for name in row.order if any(name not in other.order for other in same)]
            told += own or [row.runs[0].digest[:SHORT]]
        labelled.append(row.model_copy(update={"label": f"{row.name} ({', '.join(told)})"}) if told else row)
    return labelled


def _on_front(row: Row, among: Sequence[Row]) -> bool:
    if row.perplexity is None:
        return False
    mine = (row.perplexity, row.nbytes)
    return not any(
        other.perplexity is not None
        and other.perplexity <= mine[0]
        and other.nbytes <= mine[1]
        and (other.perplexity, other.nbytes) != mine
        for other in among
    )
