"""The nodes that a recipe's order does not name, because they only measure: how good each model is, and whether that is good enough.

evaluate@source     a stage that compares models measures the source model too, once, shared by every pipeline through its key
probe@prune         `probe`: a short evaluation after a stage, so that what each of them costs shows
evaluate@quantize   what a gate after `quantize` needs, where no stage of the order measures it there
gate@quantize       `gates`: an ordinary node, on the report of what it follows and that of its twin on the source model
data_check@train    `data_check`: whether the evaluation text is among what a model is made with
"""

from fnmatch import fnmatch

from pipeline.artifact import MODELS, Checkpoint, Dataset, EvalReport
from pipeline.errors import did_you_mean
from pipeline.graph import REFERENCE_PORT, SOURCE_MODEL, Graph, Node, Ref, worked_on
from pipeline.quality import GateConfig
from pipeline.recipe import Recipe
from pipeline.requantize import end_of_changes, requantize
from pipeline.stage import Stage, find_stage
from pipeline.wiring import Wiring

PROBE, SOURCE = "probe", "source"
EVALUATION_SPLIT = "eval"


def build(recipe: Recipe, sources: dict[Ref, type[Checkpoint]], problems: list[str]) -> Graph:
    """The typed graph of a recipe; `sources` are the types of its `model` and of every one of its `models`.

    What is wrong is added to `problems`; a node whose input could not be wired then lacks it, so that the rest can still be checked.
    """
    wiring = Wiring(recipe, sources, problems)
    end = end_of_changes(recipe)
    for name in recipe.order[:end]:
        wiring.add(name)
    if recipe.requantize:
        requantize(wiring)
    for name in recipe.order[end:]:
        wiring.add(name)
    final = wiring.latest
    _Evidence(wiring, final).add()
    return Graph(tuple(wiring.nodes), final, wiring.types)


class _Evidence:
    def __init__(self, wiring: Wiring, final: Ref) -> None:
        self.wiring, self.recipe, self.final = wiring, wiring.recipe, final

    def add(self) -> None:
        self._probes()
        measured = [(number, gate, self._measuring(number, gate)) for number, gate in enumerate(self.recipe.quality.gates)]
        self._twins()
        for number, gate, node in measured:
            if node is not None:
                self._gate(number, gate, node)
        self._data_checks()

    def _checkpoints(self) -> dict[str, Ref]:
        """The checkpoint or export that each node makes, by node, in order."""
        made = [(node, Ref(node.name, "model")) for node in self.wiring.nodes]
        return {node.name: ref for node, ref in made if issubclass(self.wiring.types.get(ref, Dataset), MODELS)}

    def _probes(self) -> None:
        probe, made = self.recipe.quality.probe, self._checkpoints()
        if probe is None:
            return
        chosen = list(made) if probe.after == "each" else probe.after
        for name in chosen:
            if name in made:
                self._measure(PROBE, probe.stage, {}, made[name], "probe: what the stage before it costs")
            else:
                self._complain(f"probe.after: '{name}' is no stage of the order that makes a model{did_you_mean(name, made)}")

    def _measure(self, label: str, stage: Stage, written: dict[str, str], model: Ref, why: str) -> Node:
        """Stage `stage` on that model, right behind what makes it."""
        before = self.wiring.latest, self.wiring.checkpoint
        self.wiring.latest = self.wiring.checkpoint = model
        inputs = self.wiring.inputs(label, stage, written)
        self.wiring.latest, self.wiring.checkpoint = before
        nodes = self.wiring.nodes
        behind = [n for n, node in enumerate(nodes) if node.name == model.node or (node.why and worked_on(node.inputs) == model)]
        return self.wiring.append(f"{label}@{model.node}", stage, inputs, why, at=max(behind, default=-1) + 1)

    def _measuring(self, number: int, gate: GateConfig) -> Node | None:
        """The node that measures what a gate asks for; made where there is none."""
        metric, made = gate.metric, self._checkpoints()
        if gate.after is not None and gate.after not in made:
            self._complain(
                f"gates[{number}].after: '{gate.after}' is no stage of the order that makes a model{did_you_mean(gate.after, made)}"
            )
            return None
        model = self.final if gate.after is None else made[gate.after]
        if model == SOURCE_MODEL:
            self._complain(f"gates[{number}].after: the order makes no model, and the source model is not held against itself")
            return None
        for node in self.wiring.nodes:
            if worked_on(node.inputs) == model and _measures(node.stage, metric) and not node.name.startswith(f"{PROBE}@"):
                return node
        stages = {name: config.stage for name, config in self.recipe.stages.items()} | {"evaluate": self._evaluation()}
        for name, stage in stages.items():
            if _measures(stage, metric):
                config = self.recipe.stages.get(name)
                made_for = f"gates[{number}] needs {metric}"
                node = self._measure(name, stage, dict(config.inputs) if config else {}, model, made_for)
                return node if worked_on(node.inputs) == model else None  # it does not take such a model, which has been noted
        known = sorted({pattern for stage in stages.values() for pattern in stage.measures()})
        self._complain(f"gates[{number}].metric: no stage of the recipe measures '{metric}'{did_you_mean(metric, known)}")
        return None

    def _evaluation(self) -> Stage:
        """As the recipe's own stage `evaluate` is set, else as it comes."""
        config = self.recipe.stages.get("evaluate")
        return config.stage if config else find_stage("evaluate")().on(self.recipe.machine)

    def _twins(self) -> None:
        """Before everything else, each comparing stage on the source model itself, without a reference."""
        for node in reversed([node for node in self.wiring.nodes if _compares(node)]):
            model = worked_on(node.inputs)
            inputs = {port: SOURCE_MODEL if ref == model else ref for port, ref in node.inputs.items() if port != REFERENCE_PORT}
            if all((node.stage.params, inputs) != (other.stage.params, other.inputs) for other in self.wiring.nodes):
                name = f"{node.name.partition('@')[0]}@{SOURCE}"
                self.wiring.append(name, node.stage, inputs, "the source model, for comparison", at=0)

    def _gate(self, number: int, gate: GateConfig, measuring: Node) -> None:
        model = worked_on(measuring.inputs)
        assert model is not None, "a gate follows what measures a model"
        inputs = {"report": _report(measuring)}
        if "source" in gate.stage.inputs():
            twin = next((node for node in self.wiring.nodes if _is_twin(node, measuring)), None)
            if twin is None:
                told = f"{measuring.name} does not measure the source model the same way; write max or min, of the metric itself"
                self._complain(f"gates[{number}]: {told}")
                return
            inputs["source"] = _report(twin)
        name = self.wiring.numbered(f"gate@{model.node}")
        behind = [n for n, node in enumerate(self.wiring.nodes) if node == measuring or node.inputs.get("report") == _report(measuring)]
        self.wiring.append(name, gate.stage, inputs, f"gates[{number}]", at=behind[-1] + 1)

    def _data_checks(self) -> None:
        check, evaluated = self.recipe.quality.data_check, Ref("data", EVALUATION_SPLIT)
        if check is None or all(evaluated not in node.inputs.values() for node in self.wiring.nodes):
            return
        others = [ref for node in self.wiring.nodes for ref in node.inputs.values() if ref != evaluated and self._is_text(ref)]
        for ref in reversed(dict.fromkeys(others)):
            why = f"is the evaluation text among {ref}, or of another kind?"
            self.wiring.append(f"data_check@{ref.port}", check, {"eval": evaluated, "other": ref}, why, at=0)

    def _is_text(self, ref: Ref) -> bool:
        return ref.node == "data" and self.recipe.data.splits[ref.port].format != "tasks"

    def _complain(self, problem: str) -> None:
        self.wiring.problems.append(problem)


def _measures(stage: Stage, metric: str) -> bool:
    return any(fnmatch(metric, pattern) for pattern in stage.measures())


def _compares(node: Node) -> bool:
    """Whether the source model is to be measured too, the same way."""
    compared = node.stage.compares or node.inputs.get(REFERENCE_PORT) == SOURCE_MODEL
    return compared and worked_on(node.inputs) not in (None, SOURCE_MODEL)


def _is_twin(node: Node, of: Node) -> bool:
    same = node.stage.name == of.stage.name and node.stage.params == of.stage.params
    return same and worked_on(node.inputs) == SOURCE_MODEL


def _report(node: Node) -> Ref:
    return next(Ref(node.name, name) for name, port in node.stage.outputs().items() if EvalReport in port.accepts)
