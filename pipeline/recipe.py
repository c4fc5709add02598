"""A composed config becomes a frozen `Recipe`: what to do, to which model, with which data. Hydra ends here.

Recipes are data. Before anything is composed, `check_document` refuses in a recipe file whatever could run code, read the machine or
choose where to write: `hydra` settings, `_target_` and its kin, interpolations that call a resolver (`${oc.env:TOKEN}`), and the
fields of `Settings`. Then every field is validated, unknown keys are refused, and all problems are reported at once as
`stage.field: what is wrong; what to write instead`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.artifact_spec import DataFormat
from pipeline.claim import LockKind
from pipeline.errors import RecipeError, did_you_mean
from pipeline.layout import Frozen
from pipeline.quality import Quality, read_quality
from pipeline.stage import Stage, find_stage, stage_names
from pipeline.sweep.axes import axis_problems
from pipeline.target import Target
from pipeline.validated import validated

ASSETS = "assets:"
NODE_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # it names folders and stands in references
SOURCES = ("model", "models", "data")  # what references may name besides stages
HUB_FIELDS = ("config", "split", "revision", "column")  # of a split
RECIPE_KEYS = (
    "order", "stages", "model", "models", "data", "target", "compute", "serve", "convert", "requantize", "sweep", "probe", "gates",
    "data_check",
)  # fmt: skip
PLAIN_REFERENCE = re.compile(r"\$\{[\w.\[\]@]+\}")


class ModelSource(Frozen):
    """A local folder, else a hub id with its revision, else an architecture alone (plans, never runs)."""

    path: str | None = None
    id: str | None = None
    revision: str = "main"
    architecture: dict[str, Any] | None = None  # a config.json, for planning without weights

    @model_validator(mode="after")
    def _one(self) -> "ModelSource":
        if not (self.path or self.id or self.architecture):
            raise ValueError("nothing to compress; give model.path=/folder or model.id=org/name")
        return self


class SplitSource(Frozen):
    """One split: a file of documents or conversations (`.jsonl`, `.parquet`; documents also `.txt`), a folder of evaluation tasks
    (`format: tasks`), or a split of a hub dataset: `{hub: org/name, split: "train[:512]", column: text}`."""

    path: str | None = None
    hub: str | None = None
    config: str | None = None  # this and what follows are of the hub dataset
    split: str = "train"  # or a slice of one: train[:512], train[10%:20%]
    revision: str = "main"
    column: str | None = None  # that holds the texts, or the conversations; None: `text`, or `messages`
    format: DataFormat = "text"

    @model_validator(mode="after")
    def _one(self) -> "SplitSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("it is either a file or a hub dataset; write path: /file.jsonl or hub: org/name")
        idle = [name for name in HUB_FIELDS if name in self.model_fields_set]
        if self.path is not None and idle:
            raise ValueError(f"{' and '.join(idle)} have an effect only with hub: org/name; leave out what a file does not need")
        if self.hub is not None and self.format == "tasks":
            raise ValueError("tasks are read from a folder; write path: /folder, or name a task of lm-evaluation-harness in the stage")
        return self


class DataSource(Frozen):
    """Named, disjoint splits. A split written as a path alone is of `format`: `{train: {path: chats.jsonl, format: messages}}`."""

    format: DataFormat = "text"
    splits: dict[str, SplitSource] = {}

    @model_validator(mode="before")
    @classmethod
    def _bare_paths(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or not isinstance(content.get("splits"), Mapping):
            return content
        default = {"format": content["format"]} if "format" in content else {}
        splits = {
            name: {**default, "path": split} if isinstance(split, str) else {**default, **split} if isinstance(split, Mapping) else split
            for name, split in content["splits"].items()
        }
        return {**content, "splits": splits}


class ServeLoad(Frozen):
    """What must fit on the target beside the weights."""

    context: int = Field(ge=1)
    batch: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class StageConfig:
    """One entry of `stages`: the configured stage and the inputs that the recipe names."""

    stage: Stage
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """What to do. Everything here is identity or plan; how to run it (outputs, tracking, mode) is `Settings`."""

    name: str
    order: tuple[str, ...]
    stages: Mapping[str, StageConfig]
    model: ModelSource
    data: DataSource
    target: Target
    serve: ServeLoad | None
    convert: Literal["auto", "never"]
    models: Mapping[str, ModelSource] = field(default_factory=dict)  # others that stages name as inputs, such as a larger teacher
    compute: Target | None = None  # the machine that runs the stages, where it is not the target
    quality: Quality = field(default_factory=Quality)
    requantize: bool = False  # where the order quantizes and its result is dense nevertheless

    @property
    def machine(self) -> Target:
        """Where the stages run."""
        return self.compute or self.target

    def on_its_machine(self) -> "Recipe":
        """With every `compute_dtype: auto` replaced by what the machine computes fastest in."""
        stages = {name: replace(config, stage=config.stage.on(self.machine)) for name, config in self.stages.items()}
        return replace(self, stages=stages, quality=self.quality.on(self.machine))


class TrackingSettings(Frozen):
    """`uri` None is MLFLOW_TRACKING_URI, else a sqlite file under the outputs folder; `enabled: false` logs nothing."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "llmpress"

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri and re.search(r"//[^/@\s]+@", uri):
            raise ValueError("it holds a password or token, which settings are written to disk with; set MLFLOW_TRACKING_URI instead")
        return uri


class Settings(Frozen):
    """How to run: nothing here changes a result."""

    mode: Literal["run", "plan", "gc", "check"] = "run"
    format: Literal["table", "json"] = "table"
    path: str | None = None  # of the checkpoint that mode=check is asked about
    outputs: str = "outputs"
    lock: LockKind = "auto"  # how runs that share the outputs folder keep out of each other's way; see pipeline/claim.py
    export_to: str | None = None
    fit: Literal["refuse", "warn"] = "refuse"
    objectives: tuple[str, ...] | None = Field(default=None, min_length=1)  # metrics that a job returns to Hydra; None: all, by name
    tracking: TrackingSettings = TrackingSettings()


def check_document(document: Any, where: str) -> None:
    """RecipeError for whatever a recipe file may not hold; `document` is its plain content, `where` its name."""
    own = sorted(set(document) & set(Settings.model_fields)) if isinstance(document, Mapping) else []
    problems = [f"{key}: a recipe says what to do, not how or where; pass `{key}` on the command line instead" for key in own]
    problems += _hostile(document, "")
    if isinstance(document, Mapping) and document.get("sweep"):
        problems += axis_problems(document["sweep"])
    if problems:
        raise RecipeError(f"{where}: {problem}" for problem in problems)


def _hostile(value: Any, path: str) -> Iterator[str]:
    """What in a document could run code or read the environment, each with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            spot = f"{path}.{key}".lstrip(".")
            if re.search(r"\bhydra\b", str(key)):
                yield f"{spot}: a recipe cannot set `hydra`; pass it on the command line instead"
            elif re.fullmatch(r"_(target|partial|recursive|convert|args)_", str(key)):
                yield f"{spot}: a recipe cannot name code to run; name a stage of the registry instead"
            else:
                yield from _hostile(item, spot)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _hostile(item, f"{path}[{i}]")
    elif isinstance(value, str) and "${" in PLAIN_REFERENCE.sub("", value):
        yield f"{path}: only plain references such as ${{serve.context}} are read; write the value itself"
    elif isinstance(value, str) and path.startswith("defaults") and re.search(r"\bhydra\b", value):
        yield f"{path}: a recipe cannot choose `hydra` groups; pass them on the command line instead"


def read_config(config: Mapping[str, Any], name: str) -> tuple[Recipe, Settings]:
    """Validate a composed config (plain containers, interpolations resolved). RecipeError with every problem."""
    problems: list[str] = []
    known = {*RECIPE_KEYS, *Settings.model_fields}
    for key in sorted(set(config) - known):
        problems.append(f"{key}: there is no such setting{did_you_mean(key, known)}")
    stages = {}
    for node, content in (config.get("stages") or {}).items():
        stage = _read_stage(node, content, problems)
        if stage is not None:
            stages[node] = stage
    order = _read_order(config.get("order"), problems)
    model = validated(ModelSource, config.get("model") or {}, "model", problems)
    models = _read_models(config.get("models") or {}, problems)
    data = validated(DataSource, config.get("data") or {}, "data", problems)
    settings = _read_settings(config, problems)
    target = validated(Target, config.get("target") or {}, "target", problems)
    compute = validated(Target, config["compute"], "compute", problems) if config.get("compute") else None
    serve = validated(ServeLoad, config["serve"], "serve", problems) if config.get("serve") else None
    evaluate = (config.get("stages") or {}).get("evaluate") or {}
    quality = read_quality(config, evaluate if isinstance(evaluate, Mapping) else {}, problems)
    convert = config.get("convert", "auto")
    if convert not in ("auto", "never"):
        problems.append(f"convert: {convert!r} is not a choice; write auto or never")
    requantize = config.get("requantize", False)
    if not isinstance(requantize, bool):
        problems.append(f"requantize: {requantize!r} is not a choice; write true or false")
    if problems:
        raise RecipeError(problems)
    assert model and data and settings and target
    return Recipe(name, order, stages, model, data, target, serve, convert, models, compute, quality, requantize), settings


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The settings alone, for a mode that needs no recipe. RecipeError with every problem."""
    problems: list[str] = []
    settings = _read_settings(config, problems)
    if settings is None or problems:
        raise RecipeError(problems)
    return settings


def _read_settings(config: Mapping[str, Any], problems: list[str]) -> Settings | None:
    settings = validated(Settings, {name: config[name] for name in Settings.model_fields if name in config}, "", problems)
    if settings is not None and settings.path is not None and settings.mode != "check":
        problems.append("path: it has an effect only with mode=check; write mode=check, or model.path=... for the model of a recipe")
    return settings


def _read_order(order: Any, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(order, list) or not order or not all(isinstance(name, str) for name in order):
        problems.append("order: a recipe needs a list of its stages, for example order=[prune,quantize,evaluate]")
        return ()
    return tuple(order)


def _read_models(content: Any, problems: list[str]) -> dict[str, ModelSource]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) and NODE_NAME.fullmatch(name) for name in content):
        problems.append("models: a mapping of names to models is needed, for example models={teacher: {path: /folder}}")
        return {}
    bare = [name for name, source in content.items() if isinstance(source, str)]
    problems += [
        f"models.{name}: is it a folder or a hub id? write models.{name}.path={content[name]} or models.{name}.id=..." for name in bare
    ]
    read = {name: validated(ModelSource, source, f"models.{name}", problems) for name, source in content.items() if name not in bare}
    return {name: source for name, source in read.items() if source is not None}


def _read_stage(node: Any, content: Any, problems: list[str]) -> StageConfig | None:
    where = f"stages.{node}"
    if not isinstance(node, str) or not NODE_NAME.fullmatch(node) or node in SOURCES:
        problems.append(f"{where}: '{node}' cannot be a stage's name; use letters, digits and _ only, and none of {', '.join(SOURCES)}")
        return None
    if not isinstance(content, Mapping) or not isinstance(content.get("stage"), str):
        problems.append(f"{where}.stage: which stage is it? there are: {', '.join(stage_names())}")
        return None
    try:
        kind = find_stage(content["stage"])
    except RecipeError as error:
        problems.extend(f"{where}.stage: {problem}" for problem in error.problems)
        return None
    params = {key: value for key, value in content.items() if key not in ("stage", "inputs", "execution")}
    found = validated(kind.Params, params, where, problems)
    execution = validated(kind.Execution, content.get("execution") or {}, f"{where}.execution", problems)
    inputs = content.get("inputs") or {}
    if not isinstance(inputs, Mapping) or not all(isinstance(value, str) for value in inputs.values()):
        problems.append(f"{where}.inputs: a mapping of port to output is needed, for example {{teacher: model}}")
        return None
    return StageConfig(kind(found, execution), dict(inputs)) if found is not None and execution is not None else None


def resolve_path(written: str, resources: Path) -> Path:
    """`assets:x` is a file the product ships; anything else is relative to the working folder."""
    if written.startswith(ASSETS):
        return resources / "assets" / written.removeprefix(ASSETS)
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise RecipeError(f"{written}: there is no such user; write the folder's full path") from None
