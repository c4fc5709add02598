"""`sweep.json`: the pipelines of a sweep side by side, built from the records of its jobs and the reports that they left.

A row is a pipeline; jobs that differ only in seeds are one row. Rows are ranked by perplexity among those that were measured alike, by
size where nothing was measured. How differences are told from noise: pipeline/sweep/ranking.py. Schema: docs/sweep.md.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from pipeline.errors import GateFailed, Interrupted, LlmpressError
from pipeline.layout import Frozen
from pipeline.sweep.positions import PositionCost, position_costs
from pipeline.sweep.ranking import Change
from pipeline.sweep.record import JobRecord, Sweep
from pipeline.sweep.results import Result, read_results
from pipeline.sweep.rows import Row, command_of, comparable, pipelines_of, ranked_rows
from pipeline.target import format_seconds

NEVER_ENDED = "it never ended: its process was killed, or is lost with its machine"
INTERRUPTED = "interrupted"  # as a sweep's problem


class FailedJob(Frozen):
    name: str
    exit_code: int | None
    error: str
    seconds: float
    command: str
    folder: str


class Executions(Frozen):
    """Of stages. `nodes` is what the jobs would have executed without sharing; `distinct` = `ran` + `hits` + what was not reached."""

    nodes: int
    distinct: int
    ran: int
    hits: int


class Choice(Frozen):
    """A pipeline to take, and why."""

    label: str
    command: str
    cost_seconds: float
    sentence: str


class SweepReport(Frozen):
    """`sweep.json`."""

    schema_version: Literal[1] = 1
    recipe: str  # several, where jobs differ in that
    command: str
    folder: str
    problem: str
    jobs: int
    ranked_by: Literal["perplexity", "size"]
    source_perplexity: float | None
    source_nbytes: int | None
    documents: int  # of the evaluation that ranks; intervals need two at least
    rows: tuple[Row, ...]
    failed: tuple[FailedJob, ...]
    executions: Executions
    positions: tuple[PositionCost, ...]
    cheapest: Choice | None  # of those that pass all gates
    suggestion: Choice | None  # without gates: the cheapest that is not told from the best
    notes: tuple[str, ...]

    @property
    def ranked(self) -> list[Row]:
        return [row for row in self.rows if row.rank is not None]

    @property
    def metrics(self) -> dict[str, float]:
        """Flat, with the names that pipelines use: `perplexity`, `nbytes` and `bits_per_weight` are the best one's."""
        counts = {
            "jobs": self.jobs,
            "jobs_failed": len(self.failed),
            "pipelines": len(self.rows),
            "ties": sum(row.tie for row in self.rows),
        }
        counts |= {f"executions_{name}": count for name, count in self.executions.model_dump().items()}
        best = self.ranked[:1]
        found = {name: getattr(row, name) for row in best for name in ("perplexity", "nbytes", "bits_per_weight", "cost_seconds")}
        return {name: float(value) for name, value in (counts | found).items() if value is not None}

    def sentences(self) -> list[str]:
        """What came out, in words."""
        choice = self.cheapest or self.suggestion
        said = [choice.sentence] if choice else []
        if not choice and any(row.decision for row in self.rows):
            said = ["no pipeline passes all of its gates"]
        return [*_findings(self), *said, *self.notes]


def build_sweep(sweep: Sweep) -> SweepReport:
    """Reads the folders of the jobs; what cannot be read is a note."""
    results, notes = read_results(sweep.jobs)
    chosen, others = comparable(pipelines_of(results), notes)
    rows = ranked_rows(chosen, others)
    first = chosen[0].counted[0] if chosen else None
    return SweepReport(
        recipe=", ".join(dict.fromkeys(result.report.recipe for result in results)) or _recipe(sweep.jobs),
        command=sweep.command,
        folder=str(sweep.folder),
        problem=sweep.problem,
        jobs=len(sweep.jobs),
        ranked_by="perplexity" if first and first.judge else "size",
        source_perplexity=first.judge.metrics.get("reference_perplexity") if first and first.judge else None,
        source_nbytes=int(first.report.source["nbytes"]) if first else None,
        documents=len(first.documents) if first else 0,
        rows=rows,
        failed=tuple(_failed(job) for job in sweep.jobs if job.exit_code != 0),
        executions=_executions(results),
        positions=position_costs(results),
        cheapest=_cheapest(rows),
        suggestion=_suggestion(rows),
        notes=tuple(dict.fromkeys(notes)),
    )


def exit_code(sweep: Sweep) -> int:
    """130 if anything was interrupted; else that of the first job that failed, where a gate's counts only if nothing else failed."""
    codes = [LlmpressError.exit_code if job.exit_code is None else job.exit_code for job in sweep.jobs]
    if Interrupted.exit_code in codes or sweep.problem == INTERRUPTED:
        return Interrupted.exit_code
    broken = [code for code in codes if code not in (0, GateFailed.exit_code)]
    if broken or sweep.problem:
        return broken[0] if broken else LlmpressError.exit_code
    return GateFailed.exit_code if GateFailed.exit_code in codes else 0


def _recipe(jobs: Sequence[JobRecord]) -> str:
    """As it was chosen, of jobs of which none was planned."""
    return ", ".join(dict.fromkeys(text.removeprefix("recipe=") for job in jobs for text in job.overrides if text.startswith("recipe=")))


def _failed(job: JobRecord) -> FailedJob:
    return FailedJob(
        name=job.name,
        exit_code=job.exit_code,
        error=NEVER_ENDED if job.exit_code is None else job.error,
        seconds=job.seconds,
        command=command_of(job),
        folder=job.run_dir,
    )


def _executions(results: Sequence[Result]) -> Executions:
    """By key, which two executions share where they are one."""
    stages = [(stage.key, stage.status) for result in results for stage in result.report.stages if stage.key]
    ran = {key for key, status in stages if status == "ran"}
    return Executions(
        nodes=sum(len(set(result.keys)) for result in results),
        distinct=len({key for key, _ in stages}),
        ran=len(ran),
        hits=len({key for key, status in stages if status == "hit"} - ran),
    )


def _cheapest(rows: Sequence[Row]) -> Choice | None:
    passed = [row for row in rows if row.decision == "deploy"]
    if not passed:
        return None
    row = min(passed, key=lambda row: row.cost_seconds)
    return _choice(row, "the cheapest pipeline that passes all of its gates")


def _suggestion(rows: Sequence[Row]) -> Choice | None:
    """Where no recipe sets gates, and perplexities are known."""
    best = [row for row in rows if row.perplexity is not None and (row.rank == 1 or row.tie)]
    if not best or any(row.decision for row in rows):
        return None
    row = min(best, key=lambda row: row.cost_seconds)
    why = "the cheapest of the best and those that tie with it" if len(best) > 1 else "the best, with which none ties"
    return _choice(row, f"no recipe sets gates, which would say what is good enough; {why}")


def _choice(row: Row, why: str) -> Choice:
    sentence = f"{why}: {row.label}, made in {format_seconds(row.cost_seconds)}"
    return Choice(label=row.label, command=row.command, cost_seconds=row.cost_seconds, sentence=sentence)


def _findings(report: SweepReport) -> Iterator[str]:
    """Of the ranking: the best, what ties with it, and by how much it is better than others."""
    ranked = report.ranked
    if not ranked:
        yield "no job has made its model, so there is nothing to rank"
        return
    best, noun = ranked[0], _noun(ranked)
    if best.perplexity is None:
        yield f"nothing measured the perplexity of the final models, so {noun}s are ranked by size"
        return
    seeds = f", the mean of {len(best.runs)} seeds" if len(best.runs) > 1 else ""
    source = (
        f", {change(best.vs_source)} from the source's {report.source_perplexity:.4g}"
        if best.vs_source and report.source_perplexity
        else ""
    )
    yield f"{best.label} is best: perplexity {best.perplexity:.4g}{seeds}{source}"
    if len(ranked) == 1:
        return
    if report.documents < 2:
        yield "differences have no intervals: that takes the losses of two documents at least, by document"
        return
    ties = [row for row in ranked if row.tie]
    others = [row for row in ranked[1:] if not row.tie]
    verb = f"{len(ties)} {noun} ties" if len(ties) == 1 else f"{len(ties)} {noun}s tie"
    yield f"{verb} with the best: {', '.join(row.label for row in ties)}" if ties else f"no other {noun} ties with the best"
    for row in others[:1] if len(others) < 2 else (others[0], others[-1]):
        yield f"{best.label} is {change(row.vs_best, sign='')} better than {row.label}"


def _noun(rows: Sequence[Row]) -> str:
    """Whether it is only their order in which they differ."""
    return "order" if len({tuple(sorted(row.order)) for row in rows}) == 1 and not any(row.params for row in rows) else "pipeline"


def change(found: Change | None, sign: str = "+") -> str:
    """`+9.8 % [+8.9, +10.7]`, small ones with more digits; empty where it is not known."""
    if found is None:
        return ""
    largest = max(abs(value) for value in (found.percent, found.low, found.high) if value is not None)
    digits = 1 if largest >= 1 else 2 if largest >= 0.1 else 3
    interval = "" if found.low is None or found.high is None else f" [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"
    return f"{found.percent:{sign}.{digits}f} %{interval}"
