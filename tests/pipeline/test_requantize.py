"""An order that quantizes early ends at the bits of one that quantizes last, or the plan says that its result is dense."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.errors import RecipeError
from pipeline.evidence import build
from pipeline.graph import SOURCE_MODEL, Graph
from pipeline.recipe import Recipe, StageConfig, read_config
from pipeline.recipe_digest import recipe_digest
from pipeline.stage import Context, Stage
from tests.pipeline.shipped import plan_of_shipped, shipped_recipe

FORMAT = {"num_bits": 3, "group_size": 64, "symmetric": False, "ignore": ["lm_head", "re:.*down_proj"]}
STAGES = {
    "prune": {"stage": "structured_prune", "mlp_ratio": 0.5},
    "coarse": {"stage": "rtn", "num_bits": 2},
    "quantize": {"stage": "gptq", "num_samples": 4, **FORMAT},
    "kv_cache": {"stage": "kv_cache", "mode": "static"},
    "evaluate": {"stage": "evaluate"},
}


def recipe_of(order: str, **config: Any) -> Recipe:
    content = {
        "order": order.split(), "stages": STAGES, "model": {"path": "/model"}, "target": {"name": "host"}, "requantize": True,
        "data": {"splits": {"eval": "eval.txt", "calibration": "calibration.txt"}}, **config,
    }  # fmt: skip
    return read_config(content, "test")[0]


def graph_of(recipe: Recipe, source: type[DenseCheckpoint] | type[QuantizedCheckpoint] = DenseCheckpoint) -> Graph:
    graph = build(recipe, {SOURCE_MODEL: source}, problems := [])
    if problems:
        raise RecipeError(problems)
    return graph


def made(order: str, **config: Any) -> list[str]:
    """Names of the nodes, without those of the source model."""
    return [node.name for node in graph_of(recipe_of(order, **config)).nodes if not node.name.endswith("@source")]


def test_a_dense_result_is_rounded_in_the_format_of_the_quantizer_and_then_measured() -> None:
    graph = graph_of(recipe_of("quantize prune evaluate"))
    assert [node.name for node in graph.nodes] == ["evaluate@source", "quantize", "dequantize", "prune", "requantize", "evaluate"]
    node = graph.nodes[4]
    assert node.stage.name == "rtn" and node.stage.params.model_dump(mode="json", include=set(FORMAT)) == FORMAT
    assert str(node.inputs["model"]) == "prune.model" and str(graph.nodes[5].inputs["model"]) == "requantize.model"
    assert str(graph.final) == "requantize.model"


def test_of_two_quantizers_the_last_one_counts() -> None:
    bits = {}
    for order in ("coarse quantize prune", "quantize coarse prune"):
        bits[order] = graph_of(recipe_of(order)).nodes[-1].stage.params.model_dump()["num_bits"]
    assert bits == {"coarse quantize prune": 3, "quantize coarse prune": 2}


@pytest.mark.parametrize("order", ["prune quantize evaluate", "quantize kv_cache evaluate", "prune evaluate", "evaluate"])
def test_an_order_that_ends_quantized_or_never_quantizes_stays_as_it_is(order: str) -> None:
    assert made(order) == made(order, requantize=False) == order.split()


def test_a_measurement_in_the_middle_of_the_order_stays_where_it_is() -> None:
    assert made("quantize evaluate prune evaluate") == ["quantize", "evaluate", "dequantize", "prune", "requantize", "evaluate@2"]


def test_a_cache_is_calibrated_with_the_weights_that_are_served() -> None:
    graph = graph_of(recipe_of("quantize prune kv_cache"))
    assert [node.name for node in graph.nodes][-3:] == ["prune", "requantize", "kv_cache"]
    assert str(graph.nodes[-1].inputs["model"]) == "requantize.model" and graph.types[graph.final] is QuantizedCheckpoint


def test_a_dequantize_that_the_order_asks_for_is_rounded_too() -> None:
    assert made("quantize dequantize", stages=STAGES | {"dequantize": {"stage": "dequantize"}})[-2:] == ["dequantize", "requantize"]


def test_a_quantized_source_is_no_quantizer_of_the_order() -> None:
    assert [node.name for node in graph_of(recipe_of("prune"), QuantizedCheckpoint).nodes] == ["dequantize", "prune"]


def test_gates_and_probes_judge_the_rounded_model() -> None:
    names = made("quantize prune", probe={}, gates=[{"metric": "perplexity", "max": 20}])
    assert {"probe@requantize", "evaluate@requantize", "gate@requantize"} < set(names)


def test_a_recipe_that_cannot_quantize_at_all_is_told_so() -> None:
    with pytest.raises(RecipeError, match=r"^requantize: no stage of the recipe quantizes; remove it, or add one"):
        made("prune", stages={"prune": STAGES["prune"]})


def test_true_or_false_is_all_that_it_can_be() -> None:
    with pytest.raises(RecipeError, match=r"^requantize: 'always' is not a choice; write true or false$"):
        made("prune", requantize="always")


class Codebook(Stage):
    """A quantizer whose format round-to-nearest cannot write."""

    name, version = "codebook", 1
    infer = memory = lambda self, **specs: None  # type: ignore[assignment]

    class Params(Stage.Params):
        num_bits: int = 5
        ignore: tuple[str, ...] = ()

    def run(self, ctx: Context, model: DenseCheckpoint) -> QuantizedCheckpoint: ...  # type: ignore[override]


class FiveBits(Codebook):
    name = "five_bits"

    class Params(Codebook.Params):
        group_size: int = 128
        symmetric: bool = True


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (
            Codebook(),
            "requantize: codebook has no group_size and no symmetric to round with; put a stage rtn at the end of `order`",
        ),
        (FiveBits(), "requantize.num_bits: 5 does not fit; input should be 2, 3, 4 or 8"),
    ],
)
def test_a_format_that_rounding_cannot_write_is_a_problem_and_not_another_format(stage: Stage, problem: str) -> None:
    recipe = recipe_of("quantize prune")
    with pytest.raises(RecipeError) as caught:
        graph_of(replace(recipe, stages={**recipe.stages, "quantize": StageConfig(stage, {})}))
    assert caught.value.problems == [problem]


def test_layers_of_unlike_bits_are_not_rounded_by_a_measurement_of_other_weights() -> None:
    mixed = {"stage": "rtn", "mixed_precision": {"budget_bits": 4.5}, "inputs": {"sensitivity": "sensitivity"}}
    stages = STAGES | {"sensitivity": {"stage": "sensitivity"}, "quantize": mixed}
    with pytest.raises(RecipeError) as caught:
        made("sensitivity quantize prune", stages=stages)
    assert caught.value.problems == [
        "requantize: quantize gives each layer its own bits, as measured before its weights were changed again; put the stages sensitivity "
        "and rtn at the end of `order` instead"
    ]


def test_what_rounding_the_result_cannot_do_is_told_of_the_quantizer_that_sets_it(tmp_path: Path) -> None:
    narrow = ["stages.prune.mlp_ratio=0.6", "stages.prune.round_to=64", "stages.prune.group_size=64"]
    with pytest.raises(RecipeError) as caught:
        plan_of_shipped(tmp_path, "ordering_study", "order=[quantize,prune]", *narrow)
    (problem,) = caught.value.problems
    assert problem.startswith("stages.quantize.group_size: 128 does not divide the columns of model.layers.*.mlp.down_proj (320)")


def test_without_it_the_plan_says_of_the_last_model_that_it_is_dense(tmp_path: Path) -> None:
    order = "order=[quantize,prune,evaluate]"
    told = {node.name: node.notes for node in plan_of_shipped(tmp_path, "ordering_study", order, "requantize=false").nodes}
    sentence = "the result is dense although quantize stands in the order; write requantize: true to round it at the end"
    assert [name for name, notes in told.items() if sentence in notes] == ["prune"]
    assert not any(sentence in node.notes for node in plan_of_shipped(tmp_path, "ordering_study", order).nodes)


def test_it_is_part_of_a_recipe_s_identity_and_its_default_is_not() -> None:
    asked = shipped_recipe("ordering_study")
    plain = recipe_digest(replace(asked, requantize=False), {})
    assert recipe_digest(asked, {}) != plain
    assert recipe_digest(shipped_recipe("ordering_study", "requantize=false"), {}) == plain


def test_the_six_orders_of_the_study_end_at_the_same_bytes_and_share_what_they_begin_with(tmp_path: Path) -> None:
    orders = [",".join(order) for order in permutations(("prune", "distill", "quantize"))]
    plans = [plan_of_shipped(tmp_path, "ordering_study", f"order=[{order},evaluate]") for order in orders]
    assert len({(plan.final_spec.nbytes, plan.final_spec.bits_per_weight) for plan in plans}) == 1
    assert len({plan.digest for plan in plans}) == 6
    trees = [[node for node in plan.nodes if node.name in ("prune", "distill", "quantize")] for plan in plans]
    assert [len({nodes[place].key for nodes in trees}) for place in range(3)] == [3, 6, 6]


def test_a_seed_of_the_study_repeats_nothing_before_distillation(tmp_path: Path) -> None:
    plans = [plan_of_shipped(tmp_path, "ordering_study", f"stages.distill.seed={seed}") for seed in (0, 1, 2)]
    distinct = {node.name: len({other.key for plan in plans for other in plan.nodes if other.name == node.name}) for node in plans[0].nodes}
    assert distinct.pop("hidden_states@source") == 1
    assert distinct == {"data_check@train": 1, "evaluate@source": 1, "prune": 1, "distill": 3, "quantize": 3, "evaluate": 3}
