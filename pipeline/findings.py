"""What a run's evidence says: the verdict of each gate, whether the model may be deployed, how good it is far into a text, and whether
the evaluation text can be trusted. Of tasks: pipeline/task_findings.py."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from pipeline.artifact import EvalReport, Manifest, Verdict
from pipeline.graph import REFERENCE_PORT, SOURCE_MODEL, worked_on
from pipeline.layout import Frozen
from pipeline.plan import Plan, PlannedNode
from pipeline.verdict import VerdictFile

Decision = Literal["deploy", "investigate", "inconclusive"]
EVALUATION = "report.json"  # of an evaluation's folder
DATA_CHECK = "data_check"


class GateReport(VerdictFile):
    """A gate's verdict; `sentence` says it in words."""

    node: str
    measures: str  # the output that was judged, such as `quantize.model`
    report: str  # the node that measured it
    says: str


class PositionReport(Frozen):
    """Tokens that were scored with `start` to `end` - 1 tokens of context. None: the source model was not measured beside."""

    start: int
    end: int
    tokens: int
    perplexity: float
    source_perplexity: float | None
    kl_divergence: float | None  # nats per token, KL(source, model), mean


class DataCheckReport(Frozen):
    """One text beside the evaluation text. `domain_*` are None where there was too little of either to tell."""

    node: str
    evaluated: str  # such as `data.eval`
    other: str
    overlap_share: float  # of the evaluation text's n-grams, 0 to 1
    overlap_documents: int  # with any
    identical_documents: int
    documents: int
    domain_distance: float | None  # 0: the same text, 1: nothing in common
    domain_baseline: float | None  # the distance of halves of the evaluation text
    domain_shift: float | None  # the distance beyond the baseline, 0 to 1
    notes: tuple[str, ...]


def twin(plan: Plan, node: PlannedNode) -> PlannedNode | None:
    """The node that measured the source model alone with the same stage, parameters and data."""

    def measurement(of: PlannedNode) -> tuple[Any, ...]:
        return of.stage.name, of.stage.params, {port: ref for port, ref in of.inputs.items() if port not in ("model", REFERENCE_PORT)}

    compared = node.inputs.get(REFERENCE_PORT, SOURCE_MODEL) == SOURCE_MODEL
    if EvalReport not in node.types.values() or worked_on(node.inputs) in (None, SOURCE_MODEL) or not compared:
        return None
    alone = [n for n in plan.nodes if n.inputs.get("model") == SOURCE_MODEL and REFERENCE_PORT not in n.inputs]
    return next((other for other in alone if measurement(other) == measurement(node)), None)


def gate_reports(plan: Plan, finished: Mapping[str, Path]) -> tuple[GateReport, ...]:
    """Of the gates that were reached; `finished` are the folders of the nodes that ended well, by name."""
    inputs = {node.name: node.inputs for node in plan.nodes}
    found = []
    for node in plan.nodes:
        if Verdict in node.types.values() and node.name in finished:
            verdict, report = VerdictFile.load(finished[node.name]), node.inputs["report"].node
            judged = worked_on(inputs.get(report, {}))
            found.append(GateReport(**verdict.model_dump(), node=node.name, measures=str(judged), report=report, says=verdict.sentence))
    return tuple(found)


def gate_metrics(gates: Sequence[GateReport]) -> dict[str, float]:
    """`gate/quantize/change`, after the gate's place; `gate/quantize.2/change` of a second gate there."""
    return {f"gate/{gate.node.partition('@')[2].replace('@', '.')}/change": gate.change for gate in gates}


def decide(plan: Plan, gates: Sequence[GateReport]) -> Decision | None:
    """None without a gate. Where one fails, or was not reached because another stopped the run, there is something to look into."""
    asked = sum(Verdict in node.types.values() for node in plan.nodes)
    if not asked:
        return None
    outcomes = {gate.outcome for gate in gates}
    if "fail" in outcomes:
        return "investigate"
    return "deploy" if outcomes == {"pass"} and len(gates) == asked else "inconclusive"


class _Bucket(BaseModel):
    start: int = Field(alias="from")
    to: int
    tokens: int
    nll: float  # sums over the tokens, nats
    reference_nll: float | None = None
    kl: float | None = None


class _Evaluation(BaseModel):
    """The part of an evaluation's report.json that is read here; evaluations from before positions were counted lack it."""

    positions: tuple[_Bucket, ...] = ()


def position_reports(evaluation: Path) -> tuple[PositionReport, ...]:
    """Of an evaluation's folder, which may say nothing of positions. ValueError (pydantic's) where what it says is something else."""
    file = evaluation / EVALUATION
    if not file.exists():  # of a stage that writes another kind of report
        return ()
    return tuple(
        PositionReport(
            start=bucket.start,
            end=bucket.to,
            tokens=bucket.tokens,
            perplexity=math.exp(bucket.nll / bucket.tokens),
            source_perplexity=None if bucket.reference_nll is None else math.exp(bucket.reference_nll / bucket.tokens),
            kl_divergence=None if bucket.kl is None else bucket.kl / bucket.tokens,
        )
        for bucket in _Evaluation.model_validate_json(file.read_bytes()).positions
    )


def data_checks(plan: Plan, finished: Mapping[str, Manifest]) -> tuple[DataCheckReport, ...]:
    """Of the checks that ended well. One that found too much overlap failed, and is the error of its run."""
    found = []
    for node in plan.nodes:
        if node.stage.name == DATA_CHECK and node.name in finished:
            manifest = finished[node.name]
            metrics = manifest.metrics
            found.append(
                DataCheckReport(
                    node=node.name,
                    evaluated=str(node.inputs["eval"]),
                    other=str(node.inputs["other"]),
                    overlap_share=metrics["overlap_share"],
                    overlap_documents=int(metrics["overlap_documents"]),
                    identical_documents=int(metrics["identical_documents"]),
                    documents=int(metrics["documents"]),
                    domain_distance=metrics.get("domain_distance"),
                    domain_baseline=metrics.get("domain_baseline"),
                    domain_shift=metrics.get("domain_shift"),
                    notes=tuple(note for note in manifest.notes if note not in node.notes),
                )
            )
    return tuple(found)
