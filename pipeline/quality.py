"""What a recipe says about evidence: `probe`, `gates` and `data_check`, each read into the stage that does it.

probe: {after: each, max_documents: 16}
gates:
  - {after: quantize, metric: perplexity, max_increase_pct: 5}
  - {metric: next_line/acc, max_drop_points: 3, on_fail: warn}      # after: the last model of the order
data_check: {max_overlap: 0.1}                                      # null: none
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from pipeline.layout import Frozen
from pipeline.stage import Stage, find_stage
from pipeline.target import Target
from pipeline.validated import validated


class ProbeSettings(Frozen):
    """A short evaluation after some stages, or each. Its figures are of fewer documents than those of `evaluate`."""

    after: Literal["each"] | tuple[str, ...] = "each"
    max_documents: int = Field(default=16, ge=1)
    max_length: int = Field(default=512, ge=2)


@dataclass(frozen=True)
class ProbeConfig:
    """`stage` is an evaluation of a slice, executed as the recipe's own `evaluate` is."""

    after: Literal["each"] | tuple[str, ...]
    stage: Stage


@dataclass(frozen=True)
class GateConfig:
    """`after` is the stage whose model is held to the limit; None: the last one that makes a model."""

    after: str | None
    stage: Stage

    @property
    def metric(self) -> str:
        metric: str = getattr(self.stage.params, "metric")  # noqa: B009  of stages.gate, which this file does not import
        return metric


@dataclass(frozen=True)
class Quality:
    """What a recipe asks for beside its order."""

    probe: ProbeConfig | None = None
    gates: tuple[GateConfig, ...] = ()
    data_check: Stage | None = None

    def on(self, machine: Target) -> "Quality":
        """With a probe that computes as that machine does fastest."""
        return self if self.probe is None else replace(self, probe=replace(self.probe, stage=self.probe.stage.on(machine)))


def read_quality(config: Mapping[str, Any], evaluate: Mapping[str, Any], problems: list[str]) -> Quality:
    """From the composed config; `evaluate` is the content of the recipe's stage of that name. Notes every problem."""
    probe = config.get("probe")
    settings = validated(ProbeSettings, probe, "probe", problems) if probe is not None else None
    gates = config.get("gates") or []
    if not isinstance(gates, list):
        problems.append("gates: a list of gates is needed, for example gates=[{after: quantize, metric: perplexity, max_increase_pct: 5}]")
        gates = []
    read = [_read_gate(number, gate, problems) for number, gate in enumerate(gates)]
    check = config.get("data_check")
    return Quality(
        probe=None if settings is None else _probe(settings, evaluate),
        gates=tuple(gate for gate in read if gate is not None),
        data_check=None if check is None else _stage("data_check", check, {}, "data_check", problems),
    )


def _probe(settings: ProbeSettings, evaluate: Mapping[str, Any]) -> ProbeConfig | None:
    execution = evaluate.get("execution") or {}
    params = {"max_documents": settings.max_documents, "max_length": settings.max_length}
    params |= {name: evaluate[name] for name in ("compute_dtype",) if name in evaluate}
    stage = _stage("evaluate", params, execution, "probe", [])  # what is wrong with the execution is told of the stage itself
    return None if stage is None else ProbeConfig(settings.after, stage)


def _read_gate(number: int, content: Any, problems: list[str]) -> GateConfig | None:
    where = f"gates[{number}]"
    if not isinstance(content, Mapping):
        problems.append(
            f"{where}: {content!r} does not fit; write for example {{after: quantize, metric: perplexity, max_increase_pct: 5}}"
        )
        return None
    after, kind = content.get("after"), find_stage("gate")
    if after is not None and not isinstance(after, str):
        problems.append(f"{where}.after: {after!r} does not fit; the name of a stage is needed")
        return None
    own = set(kind.Execution.model_fields) - set(Stage.Execution.model_fields)
    params = {name: value for name, value in content.items() if name not in own and name != "after"}
    stage = _stage("gate", params, {name: content[name] for name in own if name in content}, where, problems)
    return None if stage is None else GateConfig(after, stage)


def _stage(name: str, params: Any, execution: Any, where: str, problems: list[str]) -> Stage | None:
    kind = find_stage(name)
    found, run = validated(kind.Params, params, where, problems), validated(kind.Execution, execution, where, problems)
    return kind(found, run) if found is not None and run is not None else None
