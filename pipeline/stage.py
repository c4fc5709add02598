"""The plugin contract: a stage says what it takes, what it makes, what that needs, and does it. Nothing else.

The annotations of `run` are the ports; nothing is declared twice. What changes the result is a `Params` field and enters
the key; what only changes how it is computed is an `Execution` field and never does. `infer` and `memory` are pure and
see specs; `run` sees artifacts and fills `ctx.output`. Example:

    class Double(Stage):
        name, version = "double", 1
        class Params(Stage.Params):
            factor: float = 2.0
        def infer(self, model: ModelSpec) -> ModelSpec: ...
        def memory(self, model: ModelSpec, target: Target) -> Memory: ...
        def run(self, ctx: Context, model: DenseCheckpoint) -> DenseCheckpoint: ...

A stage never runs, caches, names, logs or tracks itself. Heavy imports are the first lines of `run`.
"""

import importlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Union

from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.compute_dtype import Computing, Dtype, fastest_dtype
from pipeline.errors import RecipeError, did_you_mean
from pipeline.layout import Frozen
from pipeline.roofline import Work
from pipeline.target import Memory, Size, Target

BUILT_IN = {
    "structured_prune": "stages.structured_prune:StructuredPrune",
    "sparse_prune": "stages.sparse_prune:SparsePrune",
    "teacher_logits": "stages.teacher_logits:RecordTeacher",
    "sensitivity": "stages.sensitivity:MeasureSensitivity",
    "distill": "stages.distill:Distill",
    "qlora": "stages.qlora:QLoRA",
    "rtn": "stages.rtn:RTN",
    "gptq": "stages.gptq:GPTQ",
    "awq": "stages.awq:AWQ",
    "int8": "stages.int8:Int8",
    "fp8": "stages.fp8:FP8",
    "bnb": "stages.bnb:BitsAndBytes",
    "kv_cache": "stages.kv_cache:KVCache",
    "dequantize": "stages.dequantize:Dequantize",
    "gguf": "stages.gguf:GGUF",
    "hidden_states": "stages.hidden_states:StoreHiddenStates",
    "evaluate": "stages.evaluate:Evaluate",
    "data_check": "stages.data_check:DataCheck",
    "lm_eval": "stages.lm_eval:LMEval",
    "benchmark": "stages.benchmark:BenchmarkStage",
    "gate": "stages.gate:Gate",
}
ENTRY_POINT_GROUP = "llmpress.stages"
MAIN = "main"  # the environment that llmpress itself is installed in
HALVES = ("half",)  # in `lightens`: half of the number that is set, and so on down to 1


@dataclass(frozen=True)
class Port:
    """One input or output. `accepts` are the artifact types that fit; `follows` is an output whose type is an input's."""

    name: str
    accepts: tuple[type[Artifact], ...]
    optional: bool = False
    follows: str | None = None

    @property
    def derived(self) -> bool:
        """Whether what comes in follows from the other inputs: the plan wires it where it spares work, and no recipe names it."""
        return all(kind.derived for kind in self.accepts)

    def takes(self, kind: type[Artifact]) -> bool:
        return issubclass(kind, self.accepts)

    def __str__(self) -> str:
        return " | ".join(kind.__name__ for kind in self.accepts)


@dataclass(frozen=True)
class Pass:
    """A forward pass that a stage makes over a text, and the stage whose stored result would bring it in its place.

    `inputs` are the storing stage's ports, each with the port of the one that makes the pass. A pass of `plain` weights is made with the
    ordinary KV cache, whatever cache the model asks for.
    """

    stage: str
    params: Mapping[str, Any]
    execution: Mapping[str, Any]
    inputs: Mapping[str, str]
    plain: bool = False


@dataclass(frozen=True)
class Context:
    """What a running stage may touch.

    `output` is its folder: empty or, for a stage that `resumes`, as an interrupted attempt of the same key and code left it.
    """

    output: Path
    emit: Callable[[dict[str, Any]], None]
    isolated: Callable[..., dict[str, Any]] | None = None  # calls `module:function` in the stage's environment (pipeline/isolated.py)

    def progress(self, label: str, done: int, total: int) -> None:
        """Say how far a long loop is; cheap enough to be called for every item."""
        self.emit({"event": "progress", "label": label, "done": done, "total": total})

    def curve(self, step: int, **metrics: float) -> None:
        """A point of a training or calibration curve."""
        self.emit({"event": "curve", "step": step, "metrics": metrics})

    def resumed(self, where: str) -> None:
        """Say that an interrupted attempt is continued, and from where: `update 120 of 400`. Counted in artifact.json."""
        self.emit({"event": "resumed", "text": where})

    def note(self, sentence: str) -> None:
        """Something the user should know about the result; kept in artifact.json and the report."""
        self.emit({"event": "note", "text": sentence})


class Stage(ABC):
    """A configured stage. Subclasses set `name`, `version` and, if they have any, `Params` and `Execution`."""

    name: ClassVar[str]
    version: ClassVar[int]
    resumes: ClassVar[bool] = False  # continues from what an interrupted attempt left in `ctx.output`; else that is cleared first
    keeps_weights: ClassVar[bool] = False  # the model computes what it did, so that what was calibrated for it stays valid
    reads_conversations: ClassVar[bool] = False  # its datasets may be of format messages; to any other stage the plan refuses these
    compares: ClassVar[bool] = False  # what it measures says something beside the source model's: it is measured the same way
    lightens: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # settings that take less memory, the nearest first, with values to try in turn
    measures_machine: ClassVar[bool] = False  # the result holds for this machine alone, so that its fingerprint is part of the key
    libraries: tuple[str, ...] = ()  # distributions whose version changes the numbers, so is part of the key; parameters may add some

    class Params(Frozen):
        """What changes the result."""

    class Execution(Frozen):
        """What changes only how it is computed."""

        memory_limit: Size | None = Field(
            default=None, ge=1
        )  # the worker's data segment, in bytes; exceeding it ends the stage, not the machine

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        self.params = params if params is not None else self.Params()
        self.execution = execution if execution is not None else self.Execution()

    @property
    def env(self) -> str:
        """The environment whose interpreter it calls for its backend: a lock file's name (pipeline/envs.py), or `main` for none."""
        return MAIN

    @classmethod
    def from_dict(cls, params: Mapping[str, Any], execution: Mapping[str, Any] | None = None) -> "Stage":
        """pydantic.ValidationError where a value does not fit."""
        return cls(cls.Params.model_validate(dict(params)), cls.Execution.model_validate(dict(execution or {})))

    @abstractmethod
    def infer(self, *args: Any, **specs: Any) -> Any:
        """The output's spec from the inputs' (by port), without weights. ValueError: why this input is illegal, led by the parameter at
        fault (`k: ...`) where there is one; InputProblems for several reasons."""

    @abstractmethod
    def memory(self, *args: Any, **specs: Any) -> Memory:
        """Peak need from the inputs' specs (by port) on `target`, the machine that the stage runs on; libraries not counted."""

    def work(self, *args: Any, **specs: Any) -> Work | None:
        """What it computes and moves, from the inputs' specs (by port), for the plan's hours. None: not known."""
        return None

    def passes(self, *args: Any, **specs: Any) -> Mapping[str, Pass]:
        """The forward passes that it makes and need not, from the inputs' specs (by port), by the derived port that each would come in by.

        What several stages of a plan have in common is computed once, where it saves that (pipeline/shared_passes.py).
        """
        return {}

    def measures(self) -> tuple[str, ...]:
        """Metrics that a gate may ask its report for, as names or patterns such as `next_line/*`."""
        return ()

    def lighter(self, *args: Any, **specs: Any) -> Iterator["Lighter"]:
        """Changes that take less memory, the nearest first: what to write, the stage and its input specs with that one change made.

        Those of `lightens`; a stage adds others, such as another kind of input.
        """
        for setting, values in self.lightens.items():
            scope, _, field = setting.rpartition(".")
            old = getattr(self.execution if scope else self.params, field)
            for value in _halves(old or 1) if values == HALVES else values:
                if value != old:
                    yield f"{setting}={str(value).lower()}", self._with(scope, field, value), specs

    def _with(self, scope: str, field: str, value: Any) -> "Stage":
        """The same stage with one setting changed, `scope` being `execution` or nothing. Not validated: `lightens` names legal values."""
        if scope:
            return type(self)(self.params, self.execution.model_copy(update={field: value}))
        return type(self)(self.params.model_copy(update={field: value}), self.execution)

    @property
    def computes(self) -> bool:
        """Whether these parameters make it multiply with weights, so that the dtype of that changes the result."""
        return isinstance(self.params, Computing)

    @property
    def compute_dtype(self) -> Dtype | None:
        """In which it multiplies; None: it does not."""
        return self.params.computes_in if self.computes and isinstance(self.params, Computing) else None

    def on(self, machine: Target) -> "Stage":
        """The same stage as it computes there: `compute_dtype: auto` is replaced by what that machine computes fastest in."""
        if not self.computes or getattr(self.params, "compute_dtype", "") != "auto":
            return self
        return self._with("", "compute_dtype", fastest_dtype(machine if self.on_gpu(machine) else machine.without_gpus()))

    def on_gpu(self, target: Target) -> bool:
        """Whether it computes on a GPU of that machine."""
        return target.cuda and getattr(self.execution, "device", "auto") != "cpu"

    @abstractmethod
    def run(self, ctx: Context, *args: Any, **inputs: Any) -> Any:
        """Make the output in `ctx.output` and return it as an artifact, or a frozen dataclass of artifacts in subfolders."""

    def unused(self) -> frozenset[str]:
        """Input ports that these parameters leave unused: they are not wired and not part of the key."""
        return frozenset()

    def given(self, kinds: Mapping[str, type[Artifact]]) -> "Stage":
        """The stage as it is for inputs of these types (by port), where another library computes on one of them."""
        return self

    def refusals(self, folder: Path) -> list[str]:
        """Why it cannot work on the model that has the files of `folder`, where no spec says it: its config.json, its tokenizer.

        Stages copy these from model to model, so that a plan hands in the source's; weights are not to be looked at.
        """
        return []

    def unmade(self) -> frozenset[str]:
        """Output ports that these parameters leave out. Where one port is left, it is the artifact itself, as of a stage with one."""
        return frozenset()

    def explain(self, *args: Any, **specs: Any) -> list[str]:
        """Sentences for the plan, such as what a ratio was rounded to."""
        return []

    def inputs(self) -> dict[str, Port]:
        """The input ports that these parameters use, in the order of `run`'s signature; none that the plan alone fills."""
        return {name: port for name, port in input_ports(type(self)).items() if name not in self.unused() and not port.derived}

    def outputs(self) -> dict[str, Port]:
        return {name: port for name, port in output_ports(type(self)).items() if name not in self.unmade()}


Lighter = tuple[str, Stage, dict[str, Any]]  # what to write, the stage and its input specs then


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


@cache
def input_ports(stage: type[Stage]) -> dict[str, Port]:
    hints = typing.get_type_hints(stage.run)
    return {name: _port(name, hint) for name, hint in hints.items() if name not in ("ctx", "return")}


@cache
def output_ports(stage: type[Stage]) -> dict[str, Port]:
    """One port named after its type (`model`, `report`, ...), or one for each field of a dataclass of artifacts."""
    hints = typing.get_type_hints(stage.run)
    made = hints["return"]
    if is_dataclass(made) and not (isinstance(made, type) and issubclass(made, Artifact)):
        field_types = typing.get_type_hints(made)
        return {field.name: _port(field.name, field_types[field.name]) for field in fields(made)}
    port = _port("", made)
    follows = next((n for n, h in hints.items() if h is made and n != "return"), None) if isinstance(made, typing.TypeVar) else None
    name = port.accepts[0].port
    return {name: Port(name, port.accepts, follows=follows)}


def _port(name: str, hint: Any) -> Port:
    """`DenseCheckpoint`, `A | B`, `A | None` or a TypeVar bound to an artifact type."""
    if isinstance(hint, typing.TypeVar):
        hint = hint.__bound__
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    accepts = tuple(m for m in members if m is not type(None))
    if not accepts or not all(isinstance(m, type) and issubclass(m, Artifact) for m in accepts):
        raise TypeError(f"port {name}: {hint} is not an artifact type")
    return Port(name, accepts, optional=len(accepts) < len(members))


@cache
def plugin_paths() -> dict[str, str]:
    """Stages of installed packages, by name; a plugin cannot take a built-in name."""
    found = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {name: path for name, path in found.items() if name not in BUILT_IN}


def stage_names() -> list[str]:
    return [*BUILT_IN, *sorted(plugin_paths())]


@cache
def find_stage(name: str) -> type[Stage]:
    """The stage registered as `name`. RecipeError with a close match where there is none."""
    path = BUILT_IN.get(name) or plugin_paths().get(name)
    if path is None:
        raise RecipeError(f"stage '{name}' does not exist{did_you_mean(name, stage_names())}")
    module, _, attribute = path.partition(":")
    try:
        stage: type[Stage] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"stage '{name}' cannot be loaded from {path} ({error}); mend or uninstall that package") from None
    return stage
