"""What several evaluations compute of one text is computed once, wherever that can be known; plans only, nothing runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import HiddenStates
from pipeline.compose import recipe_files
from pipeline.errors import RecipeError
from pipeline.graph import SOURCE_MODEL, Ref
from pipeline.identity import stage_key
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.plan import Plan, PlannedNode, make_plan
from pipeline.recipe import read_config
from pipeline.spec import ModelSpec
from pipeline.store import Store
from pipeline.tracking import header, pipeline_params, short_name
from tests.pipeline.rehearsal import plan_of, publish, small_model
from tests.pipeline.shipped import plan_of_shipped

CACHED = ["quantize", "evaluate", "kv_cache", "evaluate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def cached_plan(model: Path, outputs: Path, order: list[str] = CACHED, **changes: Any) -> Plan:
    stages: dict[str, Any] = {
        "quantize": {"stage": "rtn", "group_size": 64},
        "kv_cache": {"stage": "kv_cache"},
        "evaluate": {"stage": "evaluate"},
    }
    return plan_of(model, outputs, order=order, stages=stages | changes.pop("stages", {}), **changes)


def derived(plan: Plan) -> dict[str, dict[str, str]]:
    """By node that is spared work."""
    return {node.name: {port: ref.node for port, ref in node.derived.items()} for node in plan.nodes if node.derived}


def passes(plan: Plan) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The forward passes that the evaluations are about, and those that the plan makes, each as (weights, cache, text, parameters).

    Told from the graph by itself: the weights are those of the node that wrote them, which kv_cache does not do.
    """
    nodes = {node.name: node for node in plan.nodes}

    def view(node: PlannedNode, ref: Ref, plain: bool = False) -> tuple[Any, ...]:
        mode = None if plain else spec_of(ref).kv_cache.mode
        while ref != SOURCE_MODEL and ref.node in nodes and nodes[ref.node].stage.name == "kv_cache":
            ref = nodes[ref.node].inputs["model"]
        return str(ref), mode, str(node.inputs["eval"]), node.stage.params.model_dump_json()

    def spec_of(ref: Ref) -> ModelSpec:
        spec = nodes[ref.node].expected[ref.port] if ref.node in nodes else plan.sources[ref].spec
        assert isinstance(spec, ModelSpec)
        return spec

    wanted, made = [], []
    for node in plan.nodes:
        if node.stage.name == "hidden_states":
            made.append(view(node, node.inputs["model"]))
        if node.stage.name != "evaluate":
            continue
        views = {"states": view(node, node.inputs["model"])}
        if spec_of(node.inputs["model"]).kv_cache.mode:
            views["plain_states"] = view(node, node.inputs["model"], plain=True)
        if "reference" in node.inputs:
            views["reference_states"] = view(node, node.inputs["reference"])
        wanted += views.values()
        made += [each for port, each in views.items() if port not in node.derived]
    return wanted, made


def test_the_quickstart_makes_six_passes_where_its_evaluations_are_about_twelve(tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, "quickstart")
    wanted, made = passes(plan)
    assert (len(wanted), len(set(wanted)), len(made)) == (12, 6, 6)
    assert [node.name for node in plan.nodes if node.is_derived] == ["hidden_states@source", "hidden_states@quantize"]


def recipes() -> list[str]:
    return [file.stem for file in recipe_files()]


@pytest.mark.parametrize("name", recipes())
def test_no_recipe_makes_a_pass_twice_or_stores_one_that_is_made_once(name: str, tmp_path: Path) -> None:
    plan = plan_of_shipped(tmp_path, name)
    wanted, made = passes(plan)
    assert sorted(map(str, made)) == sorted(map(str, set(wanted)))
    readers = [ref.node for node in plan.nodes for ref in node.derived.values()]
    assert all(readers.count(node.name) > 1 for node in plan.nodes if node.is_derived)


def test_states_stand_right_before_what_reads_them_first(model: Path, tmp_path: Path) -> None:
    plan = cached_plan(model, tmp_path)
    assert [node.name for node in plan.nodes] == [
        "hidden_states@source", "evaluate@source", "quantize", "hidden_states@quantize", "evaluate", "kv_cache", "evaluate@2",
    ]  # fmt: skip
    assert derived(plan) == {
        "evaluate@source": {"states": "hidden_states@source"},
        "evaluate": {"reference_states": "hidden_states@source", "states": "hidden_states@quantize"},
        "evaluate@2": {"reference_states": "hidden_states@source", "plain_states": "hidden_states@quantize"},
    }
    states = plan.nodes[0]
    assert states.notes[0] == "inserted: computed once for 3 evaluations"
    assert states.types == {"states": HiddenStates} and plan.graph.types[Ref("hidden_states@source", "states")] is HiddenStates
    spec = states.expected["states"]
    assert spec is not None and states.memory.totals["disk"] == spec.model_dump()["nbytes"] > 0


def test_a_key_knows_nothing_of_them(model: Path, tmp_path: Path) -> None:
    plan = cached_plan(model, tmp_path)
    alone = {node.name: node.key for node in cached_plan(model, tmp_path, ["quantize", "kv_cache", "evaluate"]).nodes}
    nodes = {node.name: node for node in plan.nodes}
    assert nodes["evaluate@2"].derived.keys() == {"reference_states", "plain_states"}
    assert nodes["evaluate@2"].key == alone["evaluate"], "there the pass without the cache is made once, so that it is not stored"
    for node in plan.nodes:
        assert set(node.input_keys) == set(node.inputs) and node.key == stage_key(node.stage, node.input_keys)


def test_nothing_is_stored_for_evaluations_that_are_in_the_store(model: Path, tmp_path: Path) -> None:
    first = cached_plan(model, tmp_path)
    for node in first.nodes:
        if not node.is_derived:
            publish(Store(tmp_path), node)
    again = cached_plan(model, tmp_path)
    assert {node.status for node in again.nodes} == {"hit"} and not any(node.is_derived for node in again.nodes)
    assert again.disk == 0 and again.digest == first.digest

    changed = cached_plan(model, tmp_path, stages={"kv_cache": {"stage": "kv_cache", "mode": "static", "num_samples": 2, "max_length": 4}},
                          data={"splits": {"eval": str(tmp_path / "eval.txt"), "calibration": str(other(tmp_path))}})  # fmt: skip
    assert [(node.name, node.status) for node in changed.nodes if node.status != "hit"] == [
        ("kv_cache", "miss"), ("hidden_states@source", "miss"), ("hidden_states@quantize", "miss"), ("evaluate@2", "miss"),
    ]  # fmt: skip
    assert derived(changed).keys() == {"evaluate@2"}, "what was found needs nothing"


def other(folder: Path) -> Path:
    (folder / "calibration.txt").write_text("another text to calibrate with, of which there is quite enough for some windows")
    return folder / "calibration.txt"


def test_a_cache_is_followed_to_the_weights_it_was_given_to(model: Path, tmp_path: Path) -> None:
    stages = {"static": {"stage": "kv_cache", "mode": "static", "num_samples": 2, "max_length": 4}}
    data = {"splits": {"eval": str(tmp_path / "eval.txt"), "calibration": str(other(tmp_path))}}
    plan = cached_plan(model, tmp_path, ["quantize", "evaluate", "kv_cache", "static", "evaluate"], stages=stages, data=data)
    assert derived(plan)["evaluate@2"]["plain_states"] == "hidden_states@quantize"


def test_a_source_with_an_int8_cache_is_not_its_model_without_one(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    write_cache(model, CacheSettings(mode="per_token_head"))
    plan = cached_plan(model, tmp_path / "outputs", ["quantize", "evaluate"])
    assert derived(plan) == {
        "evaluate@source": {"states": "hidden_states@source"},
        "evaluate": {"reference_states": "hidden_states@source"},
    }
    wanted, made = passes(plan)
    assert len(wanted) == 5 and len(made) == len(set(wanted)) == 4


def test_probes_and_evaluations_read_texts_of_their_own(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path, probe={"max_documents": 2})
    names = [node.name for node in plan.nodes if node.is_derived]
    assert names == ["hidden_states@source", "hidden_states@source@2"]
    documents = [node.stage.params.model_dump()["max_documents"] for node in plan.nodes if node.is_derived]
    assert documents == [2, None]


def test_other_models_are_references_too(model: Path, tmp_path: Path) -> None:
    stages = {"evaluate": {"stage": "evaluate", "inputs": {"reference": "models.large"}}}
    large = {"large": {"path": str(small_model(tmp_path / "large"))}}
    plan = cached_plan(model, tmp_path / "outputs", stages=stages, models=large)
    assert [node.name for node in plan.nodes if node.is_derived] == ["hidden_states@quantize", "hidden_states@large"]


def test_what_the_plan_fills_is_no_input_of_a_recipe(model: Path, tmp_path: Path) -> None:
    stages = {"evaluate": {"stage": "evaluate", "inputs": {"states": "quantize"}}}
    with pytest.raises(RecipeError, match=r"stages\.evaluate\.inputs\.states: evaluate has no such input"):
        cached_plan(model, tmp_path, stages=stages)


def test_names_and_numbers_of_a_pipeline_are_the_same_with_them(model: Path, tmp_path: Path) -> None:
    plan = cached_plan(model, tmp_path)
    assert short_name(plan) == "rtn4g64>kv_cache"
    assert not [name for name in pipeline_params(plan) if name.startswith("hidden_states")]
    numbers = {name: node["number"] for name, node in header(plan, tmp_path, {}, "")["nodes"].items()}
    assert numbers["hidden_states@source"] is None
    assert [numbers[name] for name in ("evaluate@source", "quantize", "evaluate", "kv_cache", "evaluate@2")] == [1, 2, 3, 4, 5]


def test_a_hub_model_s_keys_are_pending_and_its_passes_are_shared_all_the_same(model: Path, tmp_path: Path) -> None:
    config = {
        "order": CACHED,
        "stages": {"quantize": {"stage": "rtn", "group_size": 64}, "kv_cache": {"stage": "kv_cache"}, "evaluate": {"stage": "evaluate"}},
        "model": {"architecture": {**json.loads((model / "config.json").read_text())}},
        "data": {"splits": {"eval": str(other(tmp_path))}},
        "target": {"name": "host"},
    }
    plan = make_plan(read_config(config, "test")[0], Store(tmp_path), tmp_path, execute=False)
    assert {node.status for node in plan.nodes} == {"pending"}
    assert [node.name for node in plan.nodes if node.is_derived] == ["hidden_states@source", "hidden_states@quantize"]
