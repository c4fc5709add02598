"""Probes, gates, twins and data checks become ordinary nodes at their place; what they ask in vain is told at once."""

from typing import Any

import pytest

from pipeline.artifact import DenseCheckpoint
from pipeline.errors import RecipeError
from pipeline.evidence import build
from pipeline.graph import SOURCE_MODEL, Graph
from pipeline.recipe import read_config

STAGES = {
    "prune": {"stage": "structured_prune", "mlp_ratio": 0.5},
    "quantize": {"stage": "gptq"},
    "evaluate": {"stage": "evaluate", "max_documents": 3},
}


def graph_of(problems: list[str] | None = None, **config: Any) -> Graph:
    content = {
        "order": ["prune", "quantize", "evaluate"], "stages": STAGES, "model": {"path": "/model"}, "target": {"name": "host"},
        "data": {"splits": {"eval": "eval.txt", "calibration": "calibration.txt"}}, **config,
    }  # fmt: skip
    found: list[str] = []
    graph = build(read_config(content, "test")[0], {SOURCE_MODEL: DenseCheckpoint}, found)
    if problems is None:
        assert not found
    else:
        problems += found
    return graph


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_a_gate_judges_what_the_order_measures_there_anyway() -> None:
    graph = graph_of(gates=[{"after": "quantize", "metric": "perplexity", "max_increase_pct": 5}])
    assert names(graph) == ["evaluate@source", "prune", "quantize", "evaluate", "gate@quantize"]
    assert {port: str(ref) for port, ref in graph.nodes[-1].inputs.items()} == {
        "report": "evaluate.report",
        "source": "evaluate@source.report",
    }
    assert str(graph.final) == "quantize.model"


def test_what_a_gate_needs_is_measured_where_the_order_does_not_as_the_recipe_measures() -> None:
    graph = graph_of(gates=[{"after": "prune", "metric": "perplexity", "max_increase_pct": 50}])
    assert names(graph) == ["evaluate@source", "prune", "evaluate@prune", "gate@prune", "quantize", "evaluate"]
    measuring = graph.nodes[2]
    assert measuring.stage.params.model_dump()["max_documents"] == 3 and str(measuring.inputs["model"]) == "prune.model"


def test_without_a_place_a_gate_is_for_the_last_model_and_two_gates_share_a_measurement() -> None:
    gates = [{"metric": "perplexity", "max_increase_pct": 5}, {"metric": "kl_divergence", "max": 0.1}]
    graph = graph_of(order=["prune"], gates=gates)
    assert names(graph) == ["evaluate@source", "prune", "evaluate@prune", "gate@prune", "gate@prune@2"]
    assert "source" not in graph.nodes[4].inputs  # a limit of the metric itself


def test_a_gate_behind_a_repeated_stage_names_it_with_its_number() -> None:
    gates = [{"after": "prune@2", "metric": "perplexity", "max_increase_pct": 5}]
    assert "gate@prune@2" in names(graph_of(order=["prune", "prune", "quantize"], gates=gates))


def test_a_probe_follows_each_stage_that_makes_a_model_and_the_source() -> None:
    graph = graph_of(probe={"after": "each", "max_documents": 2})
    assert names(graph) == ["probe@source", "evaluate@source", "prune", "probe@prune", "quantize", "probe@quantize", "evaluate"]
    assert {node.stage.params.model_dump()["max_documents"] for node in graph.nodes if node.name.startswith("probe@")} == {2}
    assert names(graph_of(probe={"after": ["prune"]}))[2:] == ["prune", "probe@prune", "quantize", "evaluate"]


def test_a_gate_never_rests_on_a_probe() -> None:
    graph = graph_of(order=["prune"], probe={}, gates=[{"metric": "perplexity", "max_increase_pct": 5}])
    gate = graph.nodes[-1]
    assert gate.name == "gate@prune" and str(gate.inputs["report"]) == "evaluate@prune.report"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"gates": [{"metric": "perplexty", "max": 5}]}, "gates[0].metric: no stage of the recipe measures 'perplexty'; did you mean 'per"),
        ({"gates": [{"after": "prun", "metric": "perplexity", "max": 5}]}, "gates[0].after: 'prun' is no stage of the order that makes a"),
        ({"gates": [{"after": "evaluate", "metric": "perplexity", "max": 5}]}, "gates[0].after: 'evaluate' is no stage of the order that"),
        ({"gates": [{"metric": "quiz/acc", "max_drop_pct": 5}]}, "gates[0].metric: no stage of the recipe measures 'quiz/acc'"),
        ({"order": ["evaluate"], "gates": [{"metric": "perplexity", "max": 5}]}, "gates[0].after: the order makes no model"),
        ({"probe": {"after": ["destill"]}}, "probe.after: 'destill' is no stage of the order that makes a model"),
    ],
)
def test_what_is_asked_in_vain_is_told_with_its_place(config: dict[str, Any], problem: str) -> None:
    problems: list[str] = []
    graph_of(problems, **config)
    assert len(problems) == 1 and problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"gates": [{"metric": "perplexity"}]}, "gates[0]: a gate has one limit, and it has none; write one of"),
        ({"gates": ["perplexity < 5"]}, "gates[0]: 'perplexity < 5' does not fit; write for example"),
        ({"gates": [{"metric": "perplexity", "max": 5, "on_fial": "warn"}]}, "gates[0].on_fial: there is no such parameter"),
        ({"probe": {"after": "each", "documents": 3}}, "probe.documents: there is no such parameter; did you mean 'max_documents'?"),
    ],
)
def test_what_is_written_wrong_is_refused_by_its_field(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        graph_of(**config)
    assert caught.value.problems[0].startswith(problem)
