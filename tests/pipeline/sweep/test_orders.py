"""Orders: what moves and what is pinned, prefix order, no order twice, reasons; and the tree of what the jobs have in common."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.objectives import objectives
from pipeline.plan import Plan, make_plan
from pipeline.recipe import Recipe, read_config
from pipeline.store import Store
from pipeline.sweep.orders import MOST_ORDERS, Candidate, legal_orders
from pipeline.sweep.prefix_tree import PrefixTree, identities, prefix_rank
from tests.pipeline.test_plan import publish
from tests.stages.models import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=300,
    )  # fmt: skip


@pytest.fixture
def config(model: Path, tmp_path: Path) -> dict[str, Any]:
    for split in ("train", "eval"):
        (tmp_path / f"{split}.txt").write_text(f"some text to {split} on, " * 200)
    return {
        "stages": {
            "prune": {"stage": "structured_prune", "mlp_ratio": 0.5, "group_size": 64, "round_to": 64},
            "quantize": {"stage": "rtn", "group_size": 64},
            "record": {"stage": "teacher_logits", "inputs": {"teacher": "model"}},
            "distill": {"stage": "distill", "inputs": {"teacher": "model"}},
            "evaluate": {"stage": "evaluate"},
            **{f"prune{i}": {"stage": "structured_prune", "mlp_ratio": 0.25, "group_size": 64, "round_to": 64} for i in range(8)},
        },
        "model": {"path": str(model)},
        "data": {"splits": {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt")}},
        "target": {"name": "host"},
    }


def recipe_of(config: dict[str, Any], order: str) -> Recipe:
    return read_config({**config, "order": order.split()}, "test")[0]


def candidates(config: dict[str, Any], order: str, root: Path, *, subset: bool = False) -> list[Candidate]:
    def plan_of(recipe: Recipe) -> Plan:
        return make_plan(recipe, Store(root), root, execute=False)

    return list(legal_orders(recipe_of(config, order), plan_of, subset))


def orders(found: list[Candidate]) -> list[str]:
    return [" ".join(candidate.order) for candidate in found]


def plans(found: list[Candidate]) -> list[Plan]:
    return [candidate.plan for candidate in found if candidate.plan is not None]


def all_plans(found: list[Candidate]) -> list[Plan]:
    """RecipeError where an order is illegal."""
    for candidate in found:
        if candidate.error is not None:
            raise candidate.error
    return plans(found)


def test_every_permutation_comes_once_in_prefix_order_and_the_last_evaluation_stays(config: dict[str, Any], tmp_path: Path) -> None:
    assert orders(candidates(config, "prune distill quantize evaluate", tmp_path)) == [
        "prune distill quantize evaluate", "prune quantize distill evaluate",
        "distill prune quantize evaluate", "distill quantize prune evaluate",
        "quantize prune distill evaluate", "quantize distill prune evaluate",
    ]  # fmt: skip


def test_an_evaluation_behind_a_stage_moves_with_it_and_the_one_at_the_end_stays_too(config: dict[str, Any], tmp_path: Path) -> None:
    assert orders(candidates(config, "evaluate prune evaluate distill quantize evaluate", tmp_path))[::5] == [
        "evaluate prune evaluate distill quantize evaluate", "evaluate quantize evaluate distill prune evaluate",
    ]  # fmt: skip
    assert orders(candidates(config, "prune evaluate distill quantize evaluate", tmp_path))[1] == (
        "prune evaluate quantize evaluate distill evaluate"
    )


def test_stored_logits_move_with_the_stage_that_reads_them(config: dict[str, Any], tmp_path: Path) -> None:
    config["stages"]["distill"]["inputs"]["teacher"] = "record"
    assert orders(candidates(config, "prune record distill", tmp_path)) == ["prune record distill", "record distill prune"]


def test_a_name_that_stands_twice_is_two_equal_stages(config: dict[str, Any], tmp_path: Path) -> None:
    assert orders(candidates(config, "prune distill prune", tmp_path)) == [
        "prune distill prune",
        "prune prune distill",
        "distill prune prune",
    ]


def test_subsets_leave_stages_out_and_stand_before_what_they_begin(config: dict[str, Any], tmp_path: Path) -> None:
    found = orders(candidates(config, "prune evaluate quantize evaluate", tmp_path, subset=True))
    assert found == [
        "prune evaluate", "prune evaluate quantize evaluate", "quantize evaluate", "quantize evaluate prune evaluate",
    ]  # fmt: skip


def test_an_inserted_conversion_is_legal_unless_the_recipe_says_never(config: dict[str, Any], tmp_path: Path) -> None:
    assert len(plans(candidates(config, "prune quantize", tmp_path))) == 2
    legal, illegal = candidates({**config, "convert": "never"}, "prune quantize", tmp_path)
    assert legal.plan is not None and legal.error is None
    assert illegal.plan is None and illegal.error is not None
    assert illegal.error.problems == [
        "order: prune needs a dense checkpoint and quantize.model is quantized; move prune before it, or write `convert: auto`"
    ]


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ("evaluate", "order: nothing in it makes a model, so nothing can be permuted: evaluate"),
        ("prune qantize", "order: 'qantize' is not under `stages`; did you mean 'quantize'?"),
        ("prune record", "order: record stands behind every stage that could read what it makes"),
        (" ".join(f"prune{i}" for i in range(8)), f"order: 8 stages that move have more than {MOST_ORDERS:,} orders"),
    ],
)
def test_what_cannot_be_permuted_is_told(config: dict[str, Any], tmp_path: Path, order: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        candidates(config, order, tmp_path)
    assert str(caught.value).startswith(sentence)


def test_seven_stages_are_not_too_many(config: dict[str, Any], tmp_path: Path) -> None:
    found = legal_orders(recipe_of(config, " ".join(f"prune{i}" for i in range(7))), lambda recipe: plan, False)
    plan = plans(candidates(config, "prune", tmp_path))[0]
    assert len({candidate.order for candidate in found}) == MOST_ORDERS


def test_the_tree_holds_every_distinct_execution_once(config: dict[str, Any], tmp_path: Path) -> None:
    found = all_plans(candidates(config, "prune prune0 quantize", tmp_path))
    tree = PrefixTree(found)
    assert tree.jobs == 6
    # one, two and three of the stages applied, and a dequantize behind each of the 3 quantized models that another stage works on
    assert len(tree.branches) == 3 + 6 + 6 + 3
    assert tree.executions == sum(len(plan.nodes) for plan in found) == 6 * 3 + 4
    assert set(tree.branches) == {identity for plan in found for identity in identities(plan).values()}
    assert len(tree.roots) == 3 and all(not branch.node.name.startswith("dequantize") for branch in tree.roots.values())


def test_the_tree_counts_what_the_store_holds(config: dict[str, Any], tmp_path: Path) -> None:
    first = make_plan(recipe_of(config, "prune"), Store(tmp_path / "outputs"), tmp_path, execute=True).nodes[0]
    publish(tmp_path / "outputs", first)
    tree = PrefixTree(plans(candidates(config, "prune quantize", tmp_path / "outputs")))
    assert len(tree.branches) - len(tree.to_run) == 1
    assert tree.sentences()[0] == "2 jobs: 5 stage executions instead of 5; 1 are in the store, 4 are to run"


def test_executions_without_a_key_are_told_apart_by_what_they_do_to_which_model(config: dict[str, Any], tmp_path: Path) -> None:
    keyed = all_plans(candidates(config, "prune prune0", tmp_path))
    shape = json.loads((Path(config["model"]["path"]) / "config.json").read_text())
    config["model"] = {"architecture": shape}
    pending = all_plans(candidates(config, "prune prune0", tmp_path))
    assert all(node.key for plan in keyed for node in plan.nodes) and not any(node.key for plan in pending for node in plan.nodes)
    assert len(PrefixTree(pending).branches) == len(PrefixTree(keyed).branches) == 4
    config["model"] = {"architecture": {**shape, "num_hidden_layers": 3}}
    others = all_plans(candidates(config, "prune prune0", tmp_path))
    assert len(PrefixTree([*pending, *others]).branches) == 8


def test_siblings_of_one_name_say_what_tells_them_apart(config: dict[str, Any], tmp_path: Path) -> None:
    found = plans(candidates(config, "quantize", tmp_path))
    config["stages"]["quantize"]["num_bits"] = 8
    tree = PrefixTree(found + plans(candidates(config, "quantize", tmp_path)))
    assert [branch["name"] for branch in tree.content()["tree"]] == ["quantize (num_bits=4)", "quantize (num_bits=8)"]


def test_crossed_with_another_axis_the_same_first_stages_still_follow_each_other(config: dict[str, Any], tmp_path: Path) -> None:
    found = plans(candidates(config, "prune quantize", tmp_path))
    config["stages"]["quantize"]["num_bits"] = 8
    found += plans(candidates(config, "prune quantize", tmp_path))
    ranks = prefix_rank(found)
    visited = [found[number].recipe.order[0] for number in sorted(range(4), key=ranks.__getitem__)]
    assert visited == ["prune", "prune", "quantize", "quantize"]


def test_objectives_are_the_named_metrics_in_that_order() -> None:
    metrics = {"perplexity": 12.5, "nbytes": 100.0}
    assert objectives(metrics, None) == metrics
    assert objectives(metrics, ("nbytes", "perplexity")) == (100.0, 12.5)
    assert objectives(metrics, ("nbytes",)) == 100.0
    with pytest.raises(RecipeError, match="objectives: the run has no metric 'perplexty'; did you mean 'perplexity'"):
        objectives(metrics, ("perplexty", "nbytes"))
