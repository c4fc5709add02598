"""Jobs of a sweep, rehearsed: real plans, reports and records in real folders, and evaluations with losses by document."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StageFailed
from pipeline.plan_table import plan_json
from pipeline.report import build_report
from pipeline.run_record import RunRecord
from pipeline.sweep.record import JobRecord, Sweep
from pipeline.tracking import short_name
from tests.pipeline.rehearsal import plan_of, rehearse

TOKENS = (100, 250, 400, 150, 300, 220, 180, 90, 310, 275, 130, 205)
UNEVEN = tuple(0.3 * (-1) ** number * number / 4 for number in range(len(TOKENS)))
# nats per token of the source model, whose perplexity is 5 as in every rehearsal
SOURCE = tuple(math.log(5) + level - sum(map(math.prod, zip(UNEVEN, TOKENS, strict=True))) / sum(TOKENS) for level in UNEVEN)


def losses(shift: float, wobble: float = 0.02) -> list[float]:
    """Nats per token of a model that is worse by `shift`, a little more or less so from document to document."""
    return [level + shift + wobble * math.sin(5 * number + 40 * shift) for number, level in enumerate(SOURCE)]


class Jobs:
    """The sweep's folder is `outputs/sweeps/s`; `model` is a checkpoint."""

    def __init__(self, model: Path, outputs: Path) -> None:
        self.model, self.outputs = model, outputs
        self.records: list[JobRecord] = []

    def add(
        self,
        order: Sequence[str],
        level: Sequence[float] | None = None,
        *,
        overrides: Sequence[str] = (),
        stages: dict[str, dict[str, Any]] | None = None,
        tokens: Sequence[int] = TOKENS,
        exit_code: int = 0,
        fail: str = "",
        decision: str | None = None,
    ) -> JobRecord:
        """`level` is nats per token by document of the final model, by the stage `evaluate`; `stages` replace parameters."""
        plan = self._plan(order, stages or {})
        run_dir = self.outputs / "runs" / "rehearsed" / plan.digest[:12]
        run_dir.mkdir(parents=True, exist_ok=True)
        record = RunRecord(run_dir)
        nats = sum(n * t for n, t in zip(level, tokens, strict=True)) / sum(tokens) if level else 0.0
        rehearse(plan, self.outputs, [record], fail=fail, perplexity=math.exp(nats))
        error = StageFailed(fail, "out of memory") if fail else None
        report = build_report(plan, record, error).model_copy(update={"decision": decision})
        report.write(run_dir)
        (run_dir / "plan.json").write_text(json.dumps(plan_json(plan)))
        judge = next((stage for stage in report.stages if stage.name == "evaluate" and stage.path), None)
        if judge and level:
            documents = [
                {"id": f"d{number}", "tokens": count, "nll": count * mine, "reference_nll": count * source}
                for number, (count, mine, source) in enumerate(zip(tokens, level, SOURCE, strict=False))
            ]
            (Path(judge.path or "") / "report.json").write_text(json.dumps({"metrics": {}, "documents": documents}))
        written = ("recipe=rehearsed", f"order=[{','.join(order)}]", *overrides)
        job = JobRecord(
            digest=plan.digest, overrides=written, name=short_name(plan), run_dir=str(run_dir), exit_code=4 if fail else exit_code,
            error=f"{fail}: out of memory" if fail else "", started=float(len(self.records)), seconds=report.seconds,
        )  # fmt: skip
        self.records.append(job)
        return job

    def sweep(self, *more: JobRecord, problem: str = "") -> Sweep:
        folder = self.outputs / "sweeps" / "s"
        folder.mkdir(parents=True, exist_ok=True)
        return Sweep(folder=folder, command="run -m recipe=rehearsed hydra/sweeper=orders", jobs=(*self.records, *more), problem=problem)

    def _plan(self, order: Sequence[str], replaced: dict[str, dict[str, Any]]) -> Any:
        train = self.outputs / "train.txt"
        self.outputs.mkdir(parents=True, exist_ok=True)
        train.write_text("some text to train on " * 200)
        stages: dict[str, dict[str, Any]] = {
            "prune": {"stage": "structured_prune", "mlp_ratio": 0.5},
            "distill": {"stage": "distill", "inputs": {"teacher": "model"}, "num_samples": 8, "max_length": 32, "warmup_ratio": 0.0},
            "quantize": {"stage": "rtn", "num_bits": 4},
            "evaluate": {"stage": "evaluate"},
        }
        stages = {name: config | replaced.get(name, {}) for name, config in stages.items()}
        splits = {"eval": str(self.outputs / "eval.txt"), "train": str(train)}
        return plan_of(self.model, self.outputs, order=list(order), stages=stages, data={"splits": splits}, requantize=True)
