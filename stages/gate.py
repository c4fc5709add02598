"""A quality gate: is a metric of a compressed model within its limit, for certain, or is the difference noise?"""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.artifact import EvalReport, Verdict
from pipeline.roofline import Work
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target

LIMITS = ("max_increase_pct", "max_drop_pct", "max_increase_points", "max_drop_points", "max", "min")
FROM_SOURCE = LIMITS[:4]  # are of the change from the source model
SECONDS = 1.0  # of drawing samples, measured for thousands of documents
KEPT_SAMPLES = 64 << 20  # bytes of figures and of what is drawn from them at once


class Gate(Stage):
    """Hold a metric against a limit, with an interval: the paired bootstrap over documents or task items (Efron & Tibshirani, 1993).

    `report` is the measured model's, `source` the source model's own report on the same data, paired by document or item id. The gate
    fails only where the whole interval lies beyond the limit, passes where all of it is within, and is inconclusive where it straddles it.

    `*_pct` limits are relative to the source model; `*_points` absolute: in hundredths for metrics that are shares (task metrics,
    top1_agreement), else in the metric's own unit. `max` and `min` are of the metric itself. A metric that a report holds as one number
    only (such as kl_divergence_p99) has no interval.

    Metrics: `change` (in the limit's unit), `change_low`, `change_high`. Writes `verdict.json` (pipeline/verdict.py).
    """

    name, version = "gate", 1
    libraries = ("torch",)

    class Params(Stage.Params):
        """One limit, of one metric, such as perplexity or `next_line/acc`."""

        metric: str
        max_increase_pct: float | None = Field(default=None, ge=0)
        max_drop_pct: float | None = Field(default=None, ge=0)
        max_increase_points: float | None = Field(default=None, ge=0)
        max_drop_points: float | None = Field(default=None, ge=0)
        max: float | None = None
        min: float | None = None
        confidence: float = Field(default=0.95, gt=0.5, lt=1)
        resamples: int = Field(default=10_000, ge=1000)
        seed: int = Field(default=0, ge=0, lt=2**32)

        @model_validator(mode="after")
        def _one_limit(self) -> "Gate.Params":
            given = [name for name in LIMITS if getattr(self, name) is not None]
            if len(given) != 1:
                found = f"it has {' and '.join(given)}" if given else "it has none"
                raise ValueError(f"a gate has one limit, and {found}; write one of {', '.join(LIMITS)}")
            return self

        @property
        def limit_name(self) -> str:
            return next(name for name in LIMITS if getattr(self, name) is not None)

        @property
        def limit(self) -> float:
            return float(getattr(self, self.limit_name))

    class Execution(Stage.Execution):
        """What the verdict is followed by; it is not part of the verdict."""

        # on_<outcome>: the executor reads them by these names
        on_fail: Literal["stop", "warn"] = "stop"
        on_inconclusive: Literal["stop", "pass"] = "pass"

    params: Params
    execution: Execution

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.limit_name in FROM_SOURCE else frozenset({"source"})

    def infer(self, report: None, source: None = None) -> None:
        """Reports have no spec; the graph sees to it that one measures the metric."""

    def memory(self, report: None, target: Target, source: None = None) -> Memory:
        return Memory(ram={"figures of both reports, and draws from them": KEPT_SAMPLES})

    def work(self, report: None, source: None = None) -> Work:
        return Work(cpu=SECONDS)

    def explain(self, report: None, source: None = None) -> list[str]:
        p, e = self.params, self.execution
        after = "the run stops" if e.on_fail == "stop" else "the run goes on with a warning"
        return [f"{p.metric}: {p.limit_name} {p.limit:g} at {p.confidence:.0%} confidence; where it certainly fails, {after}"]

    def run(self, ctx: Context, report: EvalReport, source: EvalReport | None = None) -> Verdict:
        from stages.runtime.judging import Rule, judge

        p = self.params
        rule = Rule(p.metric, p.limit_name, p.limit, p.confidence)
        verdict = judge(rule, report.path, source.path if source else None, p.resamples, p.seed)
        verdict.write(ctx.output)
        ends = {} if verdict.low is None or verdict.high is None else {"change_low": verdict.low, "change_high": verdict.high}
        return Verdict(ctx.output, metrics={"change": verdict.change} | ends)
