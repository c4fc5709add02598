"""What each job of a sweep left in its folder, read again: its report, what its plan had chosen, and how its final model scored.

What a pipeline is, apart from its seeds, are its `facts`: `quantize.num_bits`, `distill.teacher`, `model`, `data.eval`. Pipelines of one
order and equal facts differ only in seeds, and are one row of the ranking.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, FiniteFloat, JsonValue, ValidationError

from pipeline.artifact import DERIVED, MEASUREMENTS
from pipeline.findings import EVALUATION
from pipeline.graph import LATEST_PORTS, SOURCE_MODEL
from pipeline.recipe import SOURCES
from pipeline.report import Report, StageReport
from pipeline.requantize import REQUANTIZE
from pipeline.sweep.record import JobRecord

SEED, REPORT = "seed", "report.json"
MEASURES = frozenset(kind.__name__ for kind in MEASUREMENTS)


class PlannedOutput(BaseModel):
    type: str


class PlannedStage(BaseModel):
    """The part of a node of plan.json that is read here."""

    name: str
    stage: str
    version: int
    params: dict[str, JsonValue]
    inputs: dict[str, str]
    outputs: dict[str, PlannedOutput]


class PlanFile(BaseModel):
    final: str
    nodes: tuple[PlannedStage, ...]

    @property
    def lasting(self) -> tuple[PlannedStage, ...]:
        """Those that every plan of the recipe has: whether there are derived ones depends on what was in the store."""
        return tuple(node for node in self.nodes if not {output.type for output in node.outputs.values()} <= DERIVED)


class Document(BaseModel):
    """Of an evaluation's report.json: scored tokens, and sums of nats over them."""

    id: str
    tokens: int
    nll: FiniteFloat
    reference_nll: FiniteFloat | None = None


class Evaluation(BaseModel):
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Result:
    """A job that left a report. `documents` is empty where the final model was not measured by document."""

    record: JobRecord
    report: Report
    plan: PlanFile
    documents: tuple[Document, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(stage.key for stage in self.report.stages)

    @property
    def final(self) -> StageReport | None:
        """The execution that made the final model; None where that is the source model, or was not made."""
        made = self.plan.final.partition(".")[0]
        return next((stage for stage in self.report.stages if stage.name == made and ended_well(stage)), None)

    @property
    def has_model(self) -> bool:
        """A gate may have stopped the job after its model was made and measured."""
        return self.final is not None or (self.plan.final == str(SOURCE_MODEL) and self.report.final is not None)

    @property
    def judge(self) -> StageReport | None:
        return judge_of(self.report, self.plan)

    @property
    def perplexity(self) -> float | None:
        return self.judge.metrics["perplexity"] if self.judge else None

    @property
    def nbytes(self) -> float:
        """Of the final model's tensors."""
        return self.report.source["nbytes"] if self.final is None else float(self.final.bytes or 0)

    @property
    def bits_per_weight(self) -> float:
        return self.report.source["bits_per_weight"] if self.final is None else self.final.bits_per_weight or 0.0

    @cached_property
    def facts(self) -> dict[str, JsonValue]:
        """What was chosen, seeds apart. What an inserted stage has from the one that it copies is said once."""
        return {name: value for name, value in self._chosen.items() if not _is_seed(name)}

    @cached_property
    def seeds(self) -> dict[str, JsonValue]:
        return {name: value for name, value in self._chosen.items() if _is_seed(name)}

    @cached_property
    def _chosen(self) -> dict[str, JsonValue]:
        found: dict[str, JsonValue] = {origin.name: origin.written for origin in self.report.origins}
        for node in sorted(self.plan.lasting, key=lambda node: "@" in node.name):
            name, _, place = node.name.partition("@")
            read = {port: ref for port, ref in node.inputs.items() if port not in LATEST_PORTS and not place}
            for field, value in {"stage": node.stage, **node.params, **read}.items():
                if name != REQUANTIZE and found.get(f"{name}.{field}") != value:
                    found[f"{node.name}.{field}"] = value
        return found

    @property
    def identity(self) -> str:
        """Equal for jobs that differ in nothing but seeds."""
        nodes = [(node.name, node.stage) for node in self.plan.lasting]
        return json.dumps([self.report.order, nodes, self.facts], sort_keys=True)

    @property
    def yardstick(self) -> str:
        """Equal for final models whose perplexities can be compared: measured the same way, on the same tokens."""
        judge = self.judge
        if judge is None:
            return ""
        node = next(node for node in self.plan.nodes if node.name == judge.name)
        texts = {origin.name: origin.key for origin in self.report.origins if origin.name in node.inputs.values() and _is_data(origin.name)}
        documents = [(document.id, document.tokens) for document in self.documents]
        return json.dumps([node.stage, node.version, node.params, texts, documents], sort_keys=True)

    def seconds(self, measuring: bool) -> float:
        """Of the executions that computed what it consists of, each once: those that measure, or those that make something."""
        distinct = {stage.key: stage for stage in self.report.stages if (stage.type in MEASURES) == measuring and ended_well(stage)}
        return sum(stage.seconds or 0.0 for stage in distinct.values())


def read_results(jobs: Sequence[JobRecord]) -> tuple[list[Result], list[str]]:
    """Of the jobs that left a report, each pipeline once; and sentences about what cannot be read."""
    found: dict[tuple[str, ...], Result] = {}
    problems: list[str] = []
    summed: dict[str, None] = {}  # pipelines whose losses are known as sums only
    for record in jobs:
        folder = Path(record.run_dir)
        if not record.run_dir or not (folder / REPORT).exists():
            continue
        try:
            report = Report.model_validate_json((folder / REPORT).read_bytes())
            plan = PlanFile.model_validate_json((folder / "plan.json").read_bytes())
        except (OSError, ValidationError) as error:
            problems.append(f"{record.name or record.digest}: what it left in {folder} cannot be read: {_first_lines(error)}")
            continue
        judge = judge_of(report, plan)
        documents = _documents(judge)
        if judge is not None and not documents:
            summed[record.name] = None
        result = Result(record, report, plan, documents)
        found.setdefault(result.keys, result)
    if summed:
        problems.append(f"without intervals, since their evaluations hold no losses by document: {', '.join(summed)}")
    return list(found.values()), problems


def judge_of(report: Report, plan: PlanFile) -> StageReport | None:
    """The last stage that measured the final model's perplexity."""
    measured = [stage for stage in report.stages if stage.measures == plan.final and "perplexity" in stage.metrics]
    return measured[-1] if measured else None


def ended_well(stage: StageReport) -> bool:
    return stage.status in ("hit", "ran")


def _documents(judge: StageReport | None) -> tuple[Document, ...]:
    """None of an evaluation of somebody else's stage, or of one that was removed from the store meanwhile."""
    try:
        return Evaluation.model_validate_json((Path(judge.path) / EVALUATION).read_bytes()).documents if judge and judge.path else ()
    except (OSError, ValidationError):
        return ()


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == SEED


def _is_data(name: str) -> bool:
    return name.partition(".")[0] == SOURCES[-1]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3])
