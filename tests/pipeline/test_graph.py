"""Wiring: defaults, named inputs, conversions, repeated names, twins; and every problem at once."""

from dataclasses import dataclass
from typing import TypeVar

import pytest

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint, EvalReport, QuantizedCheckpoint
from pipeline.errors import RecipeError
from pipeline.evidence import build
from pipeline.graph import SOURCE_MODEL, Graph, Ref
from pipeline.recipe import DataSource, ModelSource, Recipe, StageConfig
from pipeline.stage import Context, Stage
from pipeline.target import Target

C = TypeVar("C", bound=Checkpoint)


@dataclass(frozen=True)
class Tuned:
    model: DenseCheckpoint
    extra: Artifact


class Pure(Stage):
    version = 1
    infer = memory = lambda self, **specs: None  # type: ignore[assignment]


class Prune(Pure):
    name = "prune"

    class Params(Stage.Params):
        measured: bool = True

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.measured else frozenset({"calibration"})

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset) -> DenseCheckpoint: ...  # type: ignore[override]


class Quantize(Pure):
    name = "quantize"

    def run(self, ctx: Context, model: DenseCheckpoint) -> QuantizedCheckpoint: ...  # type: ignore[override]


class Mark(Pure):
    name = "mark"

    def run(self, ctx: Context, model: C) -> C: ...  # type: ignore[override]


class Distill(Pure):
    name = "distill"

    def run(self, ctx: Context, student: DenseCheckpoint, teacher: DenseCheckpoint | QuantizedCheckpoint) -> DenseCheckpoint: ...  # type: ignore[override]


class Tune(Pure):
    name = "tune"

    def run(self, ctx: Context, model: DenseCheckpoint) -> Tuned: ...  # type: ignore[override]


class Evaluate(Pure):
    name = "evaluate"

    def run(self, ctx: Context, model: Checkpoint, eval: Dataset, reference: Checkpoint | None = None) -> EvalReport: ...  # type: ignore[override]


KINDS = {kind.name: kind for kind in (Prune, Quantize, Mark, Distill, Tune, Evaluate)}


def wire(
    order: str, inputs: dict[str, dict[str, str]] | None = None, source: type[Checkpoint] = DenseCheckpoint, **changes: object
) -> Graph:
    stages = {name: StageConfig(kind(), (inputs or {}).get(name, {})) for name, kind in KINDS.items()}
    fields: dict[str, object] = {
        "name": "test", "order": tuple(order.split()), "stages": stages, "model": ModelSource(path="m"),
        "data": DataSource(splits={"calibration": "c.txt", "eval": "e.txt"}), "target": Target.host(), "serve": None, "convert": "auto",
    }  # fmt: skip
    problems: list[str] = []
    graph = build(Recipe(**(fields | changes)), {SOURCE_MODEL: source}, problems)  # type: ignore[arg-type]
    if problems:
        raise RecipeError(problems)
    return graph


def told(graph: Graph) -> dict[str, dict[str, str]]:
    return {node.name: {port: str(ref) for port, ref in node.inputs.items()} for node in graph.nodes}


def test_a_recipe_reads_like_a_sentence() -> None:
    graph = wire("prune quantize evaluate")
    assert told(graph) == {
        "evaluate@source": {"model": "model", "eval": "data.eval"},
        "prune": {"model": "model", "calibration": "data.calibration"},
        "quantize": {"model": "prune.model"},
        "evaluate": {"model": "quantize.model", "eval": "data.eval", "reference": "model"},
    }
    assert graph.final == Ref("quantize", "model")
    assert graph.sources() == [SOURCE_MODEL, Ref("data", "eval"), Ref("data", "calibration")]


def test_an_input_that_the_parameters_do_not_use_is_not_wired() -> None:
    stages = {"prune": StageConfig(Prune.from_dict({"measured": False}), {})}
    assert told(wire("prune", stages=stages)) == {"prune": {"model": "model"}}


def test_quantizing_first_inserts_a_named_conversion_and_says_why() -> None:
    graph = wire("quantize prune evaluate")
    assert told(graph)["dequantize"] == {"model": "quantize.model"}
    assert told(graph)["prune"]["model"] == "dequantize.model"
    assert next(n for n in graph.nodes if n.name == "dequantize").why == "prune needs dense weights and quantize.model is quantized"
    assert graph.final == Ref("prune", "model")


def test_convert_never_makes_the_conversion_an_error() -> None:
    with pytest.raises(RecipeError, match=r"order: prune needs a dense checkpoint .* move prune before it, or write `convert: auto`"):
        wire("quantize prune", convert="never")


def test_a_quantized_source_is_converted_too() -> None:
    assert told(wire("prune", source=QuantizedCheckpoint))["dequantize"] == {"model": "model"}


def test_one_conversion_serves_every_stage_that_needs_it() -> None:
    graph = wire("quantize distill tune", {"distill": {"teacher": "model"}, "tune": {"model": "quantize.model"}})
    assert [node.name for node in graph.nodes] == ["quantize", "dequantize", "distill", "tune"]
    assert told(graph)["tune"] == {"model": "dequantize.model"}


def test_a_name_may_occur_twice_and_a_bare_reference_means_the_nearest_earlier_one() -> None:
    graph = wire("prune distill prune distill", {"distill": {"teacher": "prune"}})
    assert [node.name for node in graph.nodes] == ["prune", "distill", "prune@2", "distill@2"]
    assert told(graph)["prune@2"]["model"] == "distill.model"
    assert told(graph)["distill@2"] == {"student": "prune@2.model", "teacher": "prune@2.model"}


def test_a_generic_stage_keeps_the_type_of_its_input() -> None:
    assert wire("quantize mark").types[Ref("mark", "model")] is QuantizedCheckpoint
    assert wire("mark prune").types[Ref("mark", "model")] is DenseCheckpoint


def test_several_outputs_are_ports_of_their_own() -> None:
    graph = wire("tune quantize")
    assert graph.types[Ref("tune", "extra")] is Artifact
    assert told(graph)["quantize"] == {"model": "tune.model"}


def test_the_source_alone_is_evaluated_without_a_twin_or_a_reference() -> None:
    assert told(wire("evaluate")) == {"evaluate": {"model": "model", "eval": "data.eval"}}


def test_two_evaluations_share_one_twin() -> None:
    assert [node.name for node in wire("prune evaluate quantize evaluate").nodes] == [
        "evaluate@source", "prune", "evaluate", "quantize", "evaluate@2",
    ]  # fmt: skip


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        wire("prun distill quantize evaluate", {"quantize": {"modle": "model"}, "evaluate": {"eval": "data.evil"}})
    assert caught.value.problems == [
        "order: 'prun' is not under `stages`; did you mean 'prune'?",
        "stages.distill.inputs.teacher: not connected; write for example `teacher: model`",
        "stages.quantize.inputs.modle: quantize has no such input; did you mean 'model'?",
        "stages.evaluate.inputs.eval: there is no 'data.evil' before it; did you mean 'data.eval'?",
    ]


def test_a_wrong_type_is_told_with_both_types() -> None:
    told = r"stages\.prune\.inputs\.calibration: Dataset is needed and model is of type DenseCheckpoint; name another output"
    with pytest.raises(RecipeError, match=told):
        wire("prune", {"prune": {"calibration": "model"}})


def test_of_several_outputs_a_bare_reference_means_the_one_that_fits() -> None:
    graph = wire("tune prune distill", {"distill": {"teacher": "tune"}})
    assert told(graph)["distill"]["teacher"] == "tune.model"


@pytest.mark.parametrize(
    ("order", "teacher", "sentence"),
    [
        ("distill prune", "prune", "prune comes later in `order`; move it before distill"),
        ("distill", "distill", "distill cannot read what it makes itself"),
        ("distill", "models.large", "there is no model 'large' under `models`; write +models.large.path=/folder"),
        ("prune distill", "prune.modle", "there is no 'prune.modle' before it; did you mean 'prune.model'?"),
    ],
)
def test_an_input_that_is_not_there_is_told_with_what_to_write(order: str, teacher: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        wire(order, {"distill": {"teacher": teacher}})
    assert caught.value.problems == [f"stages.distill.inputs.teacher: {sentence}"]


def test_an_input_named_though_the_parameters_leave_it_unused_is_refused() -> None:
    stages = {"prune": StageConfig(Prune.from_dict({"measured": False}), {"calibration": "data.calibration"})}
    told = (
        r"^stages\.prune\.inputs\.calibration: these parameters leave it unused; remove it \(on the command line: ~stages\.prune\.inputs\."
    )
    with pytest.raises(RecipeError, match=told):
        wire("prune", stages=stages)


def test_a_split_that_is_needed_and_not_there_is_named() -> None:
    told = r"^data\.splits: prune needs a split `calibration`, there are: eval; write \+data\.splits\.calibration=/file\.jsonl$"
    with pytest.raises(RecipeError, match=told):
        wire("prune", data=DataSource.model_validate({"splits": {"eval": "e.txt"}}))


def test_another_model_of_the_recipe_can_be_named_as_an_input() -> None:
    large = Ref("models", "large")
    fields = {"name": "t", "order": ("distill",), "stages": {"distill": StageConfig(Distill(), {"teacher": "models.large"})}}
    recipe = Recipe(
        **fields, model=ModelSource(path="m"), models={"large": ModelSource(path="l")}, data=DataSource(), target=Target.host(),
        serve=None, convert="auto",
    )  # type: ignore[arg-type]  # fmt: skip
    graph = build(recipe, {SOURCE_MODEL: DenseCheckpoint, large: QuantizedCheckpoint}, problems := [])
    assert problems == [] and told(graph) == {"distill": {"student": "model", "teacher": "models.large"}}
    assert graph.sources() == [SOURCE_MODEL, large]
