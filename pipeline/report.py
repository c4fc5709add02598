"""What a run did, for scripts: `report.json`, built from the plan and from the events the executor sent.

`build_report` puts what pipeline/run_record.py heard beside what the plan expected, stage by stage, and adds what the evidence says. The
headline metrics have the same flat names for every recipe, so that runs compare without thought. Schema: docs/report.md.
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.artifact import EvalReport, Export, Manifest
from pipeline.compute_dtype import Dtype
from pipeline.errors import Interrupted
from pipeline.findings import (
    DataCheckReport,
    Decision,
    GateReport,
    PositionReport,
    data_checks,
    decide,
    gate_metrics,
    gate_reports,
    position_reports,
    twin,
)
from pipeline.graph import SOURCE_MODEL
from pipeline.layer_bits import LayerBits, layer_bits
from pipeline.layout import BlockCache, CacheMode, Frozen
from pipeline.origins import Origin, origins
from pipeline.plan import Plan, PlannedNode
from pipeline.run_record import NodeRecord, RunRecord, StageStatus
from pipeline.served import Served
from pipeline.serving import ServingLine, packed_format, serving_lines
from pipeline.spec import ModelSpec
from pipeline.store import write_whole
from pipeline.task_findings import TaskReport, task_metrics, task_reports

Verdict = Literal["complete", "failed", "interrupted"]
QUALITY = (
    "perplexity", "reference_perplexity", "perplexity_change_pct", "perplexity_change_pct_low", "perplexity_change_pct_high",
    "bits_per_byte", "kl_divergence", "top1_agreement",
)  # fmt: skip


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
    planned_seconds: float | None  # on the recipe's machine
    measured_peak: int | None  # bytes of resident memory, libraries included
    measured_floor: int | None  # of these, what was resident before the stage began
    measured_peak_vram: int | None  # bytes that torch reserved on all GPUs
    notes: tuple[str, ...]
    log: str | None  # of a stage that failed
    version: int = 1  # of the stage
    compute_dtype: Dtype | None = None  # in which the stage multiplies; None: it does not
    created: str | None = None  # when the artifact was made, ISO 8601, UTC
    libraries: dict[str, str] = {}  # whose version is part of the key
    environment: dict[str, str] = {}  # where it was computed: interpreter, machine, versions

    @property
    def measured_ram(self) -> int | None:
        """Bytes that the stage itself took at most, to be held against `planned_peak["ram"]`. None: not known."""
        return None if self.measured_peak is None or self.measured_floor is None else max(self.measured_peak - self.measured_floor, 0)


class FinalModel(Frozen):
    """The checkpoint or export that the pipeline is for."""

    node: str
    output: str  # as references name it, such as `quantize.model`
    type: str
    path: str
    num_bits: int | None  # of its linear weights; None when dense, where layers differ (`layer_bits`), and of a GGUF file
    group_size: int | None
    kv_cache: CacheMode | BlockCache | None  # how its cache is stored in INT8; None when 16-bit

    @property
    def is_export(self) -> bool:
        """A file that llama.cpp runs, and transformers does not."""
        return self.type == Export.__name__

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
    gates: tuple[GateReport, ...] = ()  # that were reached
    decision: Decision | None = None  # None without a gate
    tasks: tuple[TaskReport, ...] = ()
    positions: tuple[PositionReport, ...] = ()  # of the final model
    data_checks: tuple[DataCheckReport, ...] = ()
    served: Served | None = None  # as planned; None where the recipe states no load
    origins: tuple[Origin, ...] = ()
    layer_bits: tuple[LayerBits, ...] = ()  # of the final model, where its layers differ
    warnings: tuple[str, ...]
    error: str | None

    def write(self, run_dir: Path) -> None:
        write_whole(run_dir / "report.json", self.model_dump_json(indent=1) + "\n")

    def final_quality(self) -> dict[str, float]:
        """Everything that was measured of the final model; empty where nothing was."""
        measured = self.final.output if self.final else ""
        return next((stage.metrics for stage in reversed(self.stages) if stage.measures == measured and _quality(stage)), {})


def build_report(plan: Plan, record: RunRecord, error: BaseException | None = None) -> Report:
    """The report of a run that ended, well or by `error`."""
    stopped = isinstance(error, Interrupted | KeyboardInterrupt)
    verdict: Verdict = "interrupted" if stopped else "failed" if error else "complete"
    stages = tuple(_stage_report(plan, node, record.nodes.get(node.name, NodeRecord()), stopped) for node in plan.nodes)
    gates, warnings = gate_reports(plan, record.folders), list(record.warnings)
    tasks, judge = task_reports(plan, record.folders, warnings), _judge(plan, stages)
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
        metrics=(headline(plan, stages) | task_metrics(tasks, str(plan.final)) | _planned(stages) if verdict == "complete" else {})
        | gate_metrics(gates)
        | {"seconds": seconds}
        | counts,
        source=model_facts(plan.source.model_spec) | _reference_quality(plan, stages),
        stages=stages,
        gates=gates,
        decision=decide(plan, gates),
        tasks=tasks,
        positions=_positions(judge, warnings),
        data_checks=data_checks(plan, record.manifests),
        served=plan.served,
        origins=origins(plan),
        layer_bits=layer_bits(plan.final_spec) if verdict == "complete" else (),
        warnings=tuple(warnings),
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
    if manifest.tensor_bytes is not None:
        return manifest.tensor_bytes
    # manifests written before tensors were counted: the guard has held their files to the spec
    return manifest.spec.nbytes if manifest.spec else sum(file.nbytes for file in manifest.files.values())


def headline(plan: Plan, stages: tuple[StageReport, ...]) -> dict[str, float]:
    """Size of the final model (`compression_ratio` is source bytes by final bytes) and the quality that a stage measured of it."""
    spec = plan.final_spec
    metrics = model_facts(spec) | {"compression_ratio": round(plan.source.model_spec.nbytes / spec.nbytes, 4)}
    judge = _judge(plan, stages)
    return metrics | (_quality(judge) if judge else {})


def _planned(stages: tuple[StageReport, ...]) -> dict[str, float]:
    """Seconds that the plan gives to what this run executed; nothing where it cannot say for one of these stages."""
    planned = [stage.planned_seconds for stage in stages if stage.status == "ran"]
    known = [seconds for seconds in planned if seconds is not None]
    return {"planned_seconds": round(sum(known), 3)} if len(known) == len(planned) else {}


def _quality(stage: StageReport) -> dict[str, float]:
    return {name: stage.metrics[name] for name in QUALITY if name in stage.metrics}


def _judge(plan: Plan, stages: tuple[StageReport, ...]) -> StageReport | None:
    """The last report on the final model that says any of QUALITY."""
    return next((stage for stage in reversed(stages) if stage.measures == str(plan.final) and _quality(stage)), None)


def _positions(judge: StageReport | None, warnings: list[str]) -> tuple[PositionReport, ...]:
    try:
        return position_reports(Path(judge.path)) if judge and judge.path else ()
    except ValueError as error:  # made by a stage of somebody else's
        warnings.append(f"perplexity by position cannot be told from the report of {judge.name if judge else ''}: {error}")
        return ()


def _reference_quality(plan: Plan, stages: tuple[StageReport, ...]) -> dict[str, float]:
    """The source model's quality, on the text on which the final model was measured."""
    judge = _judge(plan, stages)
    return next((_quality(stage) for stage in stages if judge and stage.name == judge.reference), {})


def _stage_report(plan: Plan, node: PlannedNode, record: NodeRecord, stopped: bool) -> StageReport:
    manifest = record.manifest
    status = "failed" if record.status == "interrupted" and not stopped else record.status
    kinds, beside = list(node.types.values()), twin(plan, node)
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
        reference=beside.name if beside else None,
        seconds=round(manifest.seconds, 3) if manifest else None,
        path=str(record.path) if record.path else None,
        outputs={port: str(record.path / port if len(kinds) > 1 else record.path) for port in node.types} if record.path else {},
        bytes=artifact_bytes(manifest) if manifest else None,
        bits_per_weight=round(manifest.spec.bits_per_weight, 4) if manifest and manifest.spec else None,
        kv_bytes_per_token=manifest.spec.kv_cache.bytes_per_token if manifest and manifest.spec else None,
        metrics=manifest.metrics if manifest else {},
        planned_bytes=specs[0].nbytes if specs else None,
        planned_peak=node.memory.totals,
        planned_seconds=node.seconds,
        measured_peak=manifest.peak_rss if manifest else None,
        measured_floor=manifest.floor_rss if manifest else None,
        measured_peak_vram=manifest.peak_vram if manifest else None,
        notes=tuple(dict.fromkeys(notes)),
        log=record.log,
        version=node.stage.version,
        compute_dtype=node.stage.compute_dtype,
        created=manifest.created if manifest else None,
        libraries=manifest.backend if manifest else {},
        environment=manifest.environment if manifest else {},
    )


def _final(plan: Plan, record: RunRecord) -> FinalModel:
    made = plan.final != SOURCE_MODEL
    packed = packed_format(plan.final_spec)
    return FinalModel(
        node=plan.final.node,
        output=str(plan.final),
        type=plan.graph.types[plan.final].__name__,
        path=str(record.run_dir / "model" if made else plan.source.path),
        num_bits=None if layer_bits(plan.final_spec) else packed.num_bits,
        group_size=packed.group_size,
        kv_cache=plan.final_spec.kv_cache.mode,
    )
