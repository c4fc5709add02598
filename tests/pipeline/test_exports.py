"""Exports in a recipe: what takes one, what goes on with the checkpoint, what a pipeline then is for. The real stages, only wired."""

from typing import Any

import pytest

from pipeline.artifact import DenseCheckpoint, Export
from pipeline.errors import RecipeError
from pipeline.evidence import build
from pipeline.graph import SOURCE_MODEL, Graph, Ref
from pipeline.identity import not_installed, to_install
from pipeline.quality import GateConfig, ProbeConfig, Quality
from pipeline.recipe import DataSource, ModelSource, Recipe, StageConfig
from pipeline.stage import find_stage
from pipeline.sweep.orders import take_apart
from pipeline.target import Target

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("structured_prune", {"mlp_ratio": 0.5}),
    "quantize": ("rtn", {}),
    "kv_cache": ("kv_cache", {}),
    "gguf": ("gguf", {}),
    "f16": ("gguf", {"format": "F16"}),
    "tasks": ("lm_eval", {"tasks": ["next_line"]}),
    "evaluate": ("evaluate", {}),
}
GATES = {"perplexity": GateConfig("gguf", find_stage("gate").from_dict({"metric": "perplexity", "max": 10}))}
GATES["task"] = GateConfig("gguf", find_stage("gate").from_dict({"metric": "next_line/acc", "max": 10}))


def recipe_of(order: str, **changes: Any) -> Recipe:
    stages = {name: StageConfig(find_stage(kind).from_dict(params), {}) for name, (kind, params) in STAGES.items()}
    split = {"path": "x.txt"}
    data = DataSource.model_validate({"splits": {"eval": split, "tasks": {"path": "tasks", "format": "tasks"}}})
    fields: dict[str, Any] = {"name": "test", "order": tuple(order.split()), "stages": stages, "model": ModelSource(path="m"), "data": data}
    return Recipe(**fields | {"target": Target.host(), "serve": None, "convert": "auto"} | changes)


def wired(order: str, **changes: Any) -> Graph:
    problems: list[str] = []
    graph = build(recipe_of(order, **changes), {SOURCE_MODEL: DenseCheckpoint}, problems)
    if problems:
        raise RecipeError(problems)
    return graph


def inputs(graph: Graph, port: str = "model") -> dict[str, str]:
    return {node.name: str(node.inputs[port]) for node in graph.nodes if port in node.inputs}


def test_an_export_is_measured_and_is_what_the_pipeline_is_for() -> None:
    graph = wired("prune evaluate gguf evaluate")
    assert graph.final == Ref("gguf", "model") and graph.types[graph.final] is Export
    models, references = inputs(graph), inputs(graph, "reference")
    assert models["evaluate"] == "prune.model" and models["evaluate@2"] == "gguf.model"
    assert references == {"evaluate": "model", "evaluate@2": "model"}
    assert models["evaluate@source"] == "model"


def test_a_stage_that_takes_no_export_goes_on_with_the_checkpoint() -> None:
    models = inputs(wired("prune gguf tasks f16 kv_cache evaluate"))
    assert models["gguf"] == models["tasks"] == models["f16"] == models["kv_cache"] == "prune.model"
    assert models["evaluate"] == "kv_cache.model"


def test_packed_weights_are_multiplied_out_before_an_export() -> None:
    graph = wired("quantize gguf")
    assert [node.name for node in graph.nodes] == ["quantize", "dequantize", "gguf"]


def test_llama_cpp_is_needed_where_an_export_is_measured_and_nowhere_else() -> None:
    graph = wired("prune evaluate f16 evaluate")
    by_name = {node.name: node.stage.libraries for node in graph.nodes}
    assert "llama-cpp-python" in by_name["evaluate@2"]
    assert all("llama-cpp-python" not in by_name[name] for name in ("evaluate", "evaluate@source"))
    only = {node.name: node.stage.libraries for node in wired("f16 evaluate").nodes}
    assert "llama-cpp-python" in only["evaluate"] and only["evaluate@source"] == by_name["evaluate@source"]  # one key for all pipelines
    assert "llama-cpp-python" not in by_name["f16"] and "gguf" in by_name["f16"]
    assert "llama-cpp-python" in find_stage("gguf").from_dict({}).libraries


def test_a_missing_library_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.identity.library_version", lambda name: None if name in ("llama-cpp-python", "mylib") else "1")
    assert not_installed(("torch", "llama-cpp-python")) == "llama-cpp-python (extra gguf) is not installed here"
    assert to_install(("torch", "llama-cpp-python")) == "llmpress[gguf]"
    assert to_install(("mylib", "llama-cpp-python")) == to_install(("torch",)) == "what llmpress depends on"


def test_a_gate_on_an_export_measures_the_export() -> None:
    graph = wired("gguf", quality=Quality(gates=(GATES["perplexity"],)))
    assert inputs(graph)["evaluate@gguf"] == "gguf.model"
    with pytest.raises(RecipeError) as refused:  # and never the checkpoint in its place
        wired("gguf", quality=Quality(gates=(GATES["task"],)))
    assert any("Checkpoint is needed and gguf.model is of type Export" in problem for problem in refused.value.problems)


def test_probes_follow_exports_too() -> None:
    probe = ProbeConfig("each", find_stage("evaluate").from_dict({"max_documents": 4}))
    assert inputs(wired("prune gguf", quality=Quality(probe=probe)))["probe@gguf"] == "gguf.model"


def test_an_export_stays_where_it_stands_when_orders_are_searched() -> None:
    parts = take_apart(recipe_of("prune quantize gguf evaluate"))
    assert [block.name for block in parts.blocks] == ["prune", "quantize"] and parts.last == ("gguf", "evaluate")
