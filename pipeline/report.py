"""What a run did, for scripts: `report.json`, built from the plan and from the events the executor sent.

`RunRecord` listens while the run goes on; `build_report` puts what it saw beside what the plan expected, stage by stage. The
headline metrics have the same flat names for every recipe, so that runs compare without thought. Schema: docs/report.md.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import EvalReport, Manifest
from pipeline.errors import Interrupted
from pipeline.graph import REFERENCE_PORT, SOURCE_MODEL
from pipeline.layout import CacheMode, Frozen
from pipeline.plan import Plan, PlannedNode
from pipeline.serving import ServingLine, packed_format, serving_lines
from pipeline.spec import ModelSpec
from pipeline.store import write_whole

StageStatus = Literal["hit", "ran", "failed", "interrupted", "not reached"]
Verdict = Literal["complete", "failed", "interrupted"]
QUALITY = ("perplexity", "reference_perplexity", "perplexity_change_pct", "bits_per_byte", "kl_divergence", "top1_agreement")


class StageReport(Frozen):
    """One node of the graph: what the plan expected of it and what came out. None where it does not apply or is not known."""

    name: str
    stage: str
    type: str  # of its output
    key: str
    status: StageStatus
    measures: str | None  # of a quality report: the output it measured, `model` being the source
    reference: str | None  # the node that measured the source model the same way
    seconds: float | None  # of the execution that computed it, which may have been an earlier run
    path: str | None
    outputs: dict[str, str]  # folder of each output, by port
    bytes: int | None  # tensor data of a checkpoint, files of anything else
    bits_per_weight: float | None
    kv_bytes_per_token: int | None  # of a checkpoint
    metrics: dict[str, float]
    planned_bytes: int | None
    planned_peak: dict[str, int]  # bytes by place: ram, vram, disk
    measured_peak: int | None  # bytes of resident memory
    notes: tuple[str, ...]
    log: str | None  # of a stage that failed


class FinalModel(Frozen):
    """The checkpoint that the pipeline is for."""

    node: str
    output: str  # as references name it, such as `quantize.model`
    type: str
    path: str
    num_bits: int | None  # of its linear weights; None when dense
    group_size: int | None
    kv_cache: CacheMode | None  # how its cache is stored in INT8; None when 16-bit

    @property
    def is_source(self) -> bool:
        """The recipe makes no model: it measures one, or makes an adapter."""
        return self.output == str(SOURCE_MODEL)


class Report(Frozen):
    """`report.json`."""

    schema_version: Literal[1] = 1
    recipe: str
    digest: str
    order: tuple[str, ...]
    created: str  # when the run started, ISO 8601, UTC
    seconds: float
    verdict: Verdict
    final: FinalModel | None  # None unless complete
    serving: tuple[ServingLine, ...]  # of the final model, by engine; empty unless complete
    metrics: dict[str, float]  # the headline: see `headline`
    source: dict[str, float]
    stages: tuple[StageReport, ...]
    warnings: tuple[str, ...]
    error: str | None

    def write(self, run_dir: Path) -> None:
        write_whole(run_dir / "report.json", self.model_dump_json(indent=1) + "\n")

    def final_quality(self) -> dict[str, float]:
        """Everything that was measured of the final model; empty where nothing was."""
        measured = self.final.output if self.final else ""
        return next((stage.metrics for stage in reversed(self.stages) if stage.measures == measured), {})


@dataclass
class NodeRecord:
    """What the events said about one node."""

    status: StageStatus = "not reached"
    key: str = ""
    path: Path | None = None
    manifest: Manifest | None = None
    reason: str = ""
    log: str | None = None
    notes: list[str] = field(default_factory=list)


class RunRecord:
    """A listener: remembers what a report needs. `run_dir` is the run's folder, where `model` links to the final artifact."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.started = time.time()
        self.finished: float | None = None
        self.nodes: dict[str, NodeRecord] = {}
        self.warnings: list[str] = []

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "run_started":
            self.started = event["time"]
        elif kind == "run_finished":
            self.finished = event["time"]
        elif kind == "warning":
            self.warnings.append(event["text"])
        if event.get("node"):
            self._of_node(kind, self.nodes.setdefault(event["node"], NodeRecord()), event)

    def _of_node(self, kind: str, node: NodeRecord, event: Mapping[str, Any]) -> None:
        if kind == "node_started":
            node.status = "interrupted"  # until it is heard of again
        elif kind == "note":
            node.notes.append(event["text"])
        elif kind == "resumed":
            node.notes.append(f"continued an interrupted attempt from {event['text']}")
        elif kind in ("node_hit", "node_finished"):
            node.status = "hit" if kind == "node_hit" else "ran"
            node.key, node.path = event["key"], Path(event["path"])
            node.manifest = Manifest.load(node.path)
            node.notes += event.get("notes", [])
        elif kind == "node_failed":
            node.status, node.reason, node.log = "failed", event["reason"], event.get("log") or None


def build_report(plan: Plan, record: RunRecord, error: BaseException | None = None) -> Report:
    """The report of a run that ended, well or by `error`."""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    verdict: Verdict = "interrupted" if stopped else "failed" if error else "complete"
    stages = tuple(_stage_report(plan, node, record.nodes.get(node.name, NodeRecord()), stopped) for node in plan.nodes)
    finished = record.finished if record.finished is not None else time.time()
    seconds = round(finished - record.started, 3)
    counts = {f"stages_{status}": float(sum(stage.status == status for stage in stages)) for status in ("ran", "hit")}
    return Report(
        recipe=plan.recipe.name,
        digest=plan.digest,
        order=plan.recipe.order,
        created=datetime.fromtimestamp(record.started, UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        verdict=verdict,
        final=_final(plan, record) if verdict == "complete" else None,
        serving=serving_lines(plan.final_spec) if verdict == "complete" else (),
        metrics=(headline(plan, stages) if verdict == "complete" else {}) | {"seconds": seconds} | counts,
        source=model_facts(plan.source.model_spec) | _reference_quality(plan, stages),
        stages=stages,
        warnings=tuple(record.warnings),
        error=(str(error) or type(error).__name__) if error else None,
    )


def model_facts(spec: ModelSpec) -> dict[str, float]:
    """Size as metrics: tensor bytes, bits per weight, bytes of KV cache per token."""
    return {
        "nbytes": float(spec.nbytes),
        "bits_per_weight": round(spec.bits_per_weight, 4),
        "kv_bytes_per_token": float(spec.kv_cache.bytes_per_token),
    }


def artifact_bytes(manifest: Manifest) -> int:
    """Tensor bytes of a checkpoint, file bytes of anything else."""
    return manifest.spec.nbytes if manifest.spec else sum(file.nbytes for file in manifest.files.values())


def headline(plan: Plan, stages: tuple[StageReport, ...]) -> dict[str, float]:
    """Size of the final model (`compression_ratio` is source bytes by final bytes) and the quality that a stage measured of it."""
    spec = plan.final_spec
    metrics = model_facts(spec) | {"compression_ratio": round(plan.source.model_spec.nbytes / spec.nbytes, 4)}
    judge = _judge(plan, stages)
    return metrics | (_quality(judge) if judge else {})


def _quality(stage: StageReport) -> dict[str, float]:
    return {name: stage.metrics[name] for name in QUALITY if name in stage.metrics}


def _judge(plan: Plan, stages: tuple[StageReport, ...]) -> StageReport | None:
    """The last quality report of the final model."""
    return next((stage for stage in reversed(stages) if stage.measures == str(plan.final)), None)


def _reference_quality(plan: Plan, stages: tuple[StageReport, ...]) -> dict[str, float]:
    """The source model's quality, on the text on which the final model was measured."""
    judge = _judge(plan, stages)
    return next((_quality(stage) for stage in stages if judge and stage.name == judge.reference), {})


def _reference_node(plan: Plan, node: PlannedNode) -> str | None:
    """The node that measured the source model alone with the same stage, parameters and data."""

    def measurement(of: PlannedNode) -> tuple[Any, ...]:
        return of.stage.name, of.stage.params, {port: ref for port, ref in of.inputs.items() if port not in ("model", REFERENCE_PORT)}

    if node.inputs.get(REFERENCE_PORT) != SOURCE_MODEL:
        return None
    alone = [n for n in plan.nodes if n.inputs.get("model") == SOURCE_MODEL and REFERENCE_PORT not in n.inputs]
    return next((twin.name for twin in alone if measurement(twin) == measurement(node)), None)


def _stage_report(plan: Plan, node: PlannedNode, record: NodeRecord, stopped: bool) -> StageReport:
    manifest = record.manifest
    status = "failed" if record.status == "interrupted" and not stopped else record.status
    kinds = list(node.types.values())
    specs = [spec for spec in node.expected.values() if isinstance(spec, ModelSpec)]
    notes = [*node.notes, *(manifest.notes if manifest else ()), *record.notes]
    if record.reason:
        notes.append(record.reason)
    return StageReport(
        name=node.name,
        stage=node.stage.name,
        type=kinds[0].__name__,
        key=record.key or node.key,
        status=status,
        measures=str(node.inputs["model"]) if EvalReport in kinds and "model" in node.inputs else None,
        reference=_reference_node(plan, node),
        seconds=round(manifest.seconds, 3) if manifest else None,
        path=str(record.path) if record.path else None,
        outputs={port: str(record.path / port if len(kinds) > 1 else record.path) for port in node.types} if record.path else {},
        bytes=artifact_bytes(manifest) if manifest else None,
        bits_per_weight=round(manifest.spec.bits_per_weight, 4) if manifest and manifest.spec else None,
        kv_bytes_per_token=manifest.spec.kv_cache.bytes_per_token if manifest and manifest.spec else None,
        metrics=manifest.metrics if manifest else {},
        planned_bytes=specs[0].nbytes if specs else None,
        planned_peak=node.memory.totals,
        measured_peak=manifest.peak_rss if manifest else None,
        notes=tuple(dict.fromkeys(notes)),
        log=record.log,
    )


def _final(plan: Plan, record: RunRecord) -> FinalModel:
    made = plan.final != SOURCE_MODEL
    packed = packed_format(plan.final_spec)
    return FinalModel(
        node=plan.final.node,
        output=str(plan.final),
        type=plan.graph.types[plan.final].__name__,
        path=str(record.run_dir / "model" if made else plan.source.path),
        num_bits=packed.num_bits,
        group_size=packed.group_size,
        kv_cache=plan.final_spec.kv_cache.mode,
    )
