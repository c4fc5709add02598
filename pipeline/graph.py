"""Ports wired and types checked: a recipe's `order` becomes a graph of nodes, or every reason why it cannot.

Default wiring, so that a recipe reads like a sentence:
    model, student   the latest checkpoint before it (reports are skipped)
    reference        the source model
    a Dataset port   the split of the same name, `calibration` <- data.calibration
    anything else    must be named under `inputs`: `teacher: model` is the source model, `teacher: models.large` another model that
                     the recipe names, `prune.model` an output of a node

Legal order is a subtype relation. Where a dense checkpoint is needed and a quantized one comes, the named conversion
`dequantize` is inserted (`convert: never` makes it an error). A name that stands twice in `order` makes nodes `prune` and
`prune@2`; a bare reference means the nearest earlier one. A stage that compares with a reference gets a twin on the source model
itself (`evaluate@source`), once, shared by every pipeline through its key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.errors import did_you_mean
from pipeline.recipe import SOURCES, Recipe
from pipeline.stage import Port, Stage, find_stage

LATEST_PORTS = ("model", "student")
REFERENCE_PORT = "reference"


@dataclass(frozen=True)
class Ref:
    """One output: of a node, of the source `model`, of `models` (port = name) or of `data` (port = split)."""

    node: str
    port: str

    def __str__(self) -> str:
        return f"{self.node}.{self.port}" if self.node != self.port else self.node


SOURCE_MODEL = Ref("model", "model")


@dataclass(frozen=True)
class Node:
    """One execution of a stage in the graph. `why` says how a node came in that the recipe's order does not name."""

    name: str
    stage: Stage
    inputs: Mapping[str, Ref]
    why: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes in the order they run, and the checkpoint that the pipeline is for."""

    nodes: tuple[Node, ...]
    final: Ref
    types: Mapping[Ref, type[Artifact]]

    def sources(self) -> list[Ref]:
        """The parts of `model`, `models` and `data` that some node reads, each once."""
        used = [ref for node in self.nodes for ref in node.inputs.values() if ref.node in SOURCES]
        return list(dict.fromkeys([SOURCE_MODEL, *used]))


def build(recipe: Recipe, sources: Mapping[Ref, type[Checkpoint]], problems: list[str]) -> Graph:
    """The typed graph of a recipe; `sources` are the types of its `model` and of every one of its `models`.

    What is wrong is added to `problems`; a node whose input could not be wired then lacks it, so that the rest can still be checked.
    """
    builder = _Builder(recipe, sources, problems)
    for name in recipe.order:
        builder.add(name)
    builder.add_twins()
    return Graph(tuple(builder.nodes), builder.latest, builder.types)


@dataclass
class _Builder:
    recipe: Recipe
    sources: Mapping[Ref, type[Checkpoint]]
    problems: list[str]
    nodes: list[Node] = field(default_factory=list)
    latest: Ref = SOURCE_MODEL

    def __post_init__(self) -> None:
        self.types: dict[Ref, type[Artifact]] = dict(self.sources)
        self.types |= {Ref("data", split): Dataset for split in self.recipe.data.splits}
        self.compared: list[Node] = []

    def add(self, name: str) -> None:
        config = self.recipe.stages.get(name)
        if config is None:
            self.problems.append(f"order: '{name}' is not under `stages`{did_you_mean(name, self.recipe.stages)}")
            return
        inputs: dict[str, Ref] = {}
        ports = config.stage.inputs()
        for unknown in sorted(set(config.inputs) - set(ports)):
            if unknown in config.stage.unused():
                told = f"these parameters leave it unused; remove it (on the command line: ~stages.{name}.inputs.{unknown})"
            else:
                told = f"{config.stage.name} has no such input{did_you_mean(unknown, ports)}"
            self.problems.append(f"stages.{name}.inputs.{unknown}: {told}")
        for port in ports.values():
            ref = self._wire(name, port, config.inputs.get(port.name))
            if ref is not None:
                inputs[port.name] = ref
        compared = REFERENCE_PORT in inputs and REFERENCE_PORT not in config.inputs
        if compared and self._model(inputs) == SOURCE_MODEL:
            del inputs[REFERENCE_PORT]  # the source model is not compared with itself
            compared = False
        node = self._append(name, config.stage, inputs)
        if compared:
            self.compared.append(node)

    def add_twins(self) -> None:
        """Before everything else, each comparing stage on the source model itself, without a reference."""
        for node in reversed(self.compared):
            model = self._model(node.inputs)
            inputs = {port: SOURCE_MODEL if ref == model else ref for port, ref in node.inputs.items() if port != REFERENCE_PORT}
            twin = Node(f"{node.name.partition('@')[0]}@source", node.stage, inputs, "the source model, for comparison")
            if all((twin.stage.params, twin.inputs) != (other.stage.params, other.inputs) for other in self.nodes):
                self.nodes.insert(0, twin)
                self.types |= {Ref(twin.name, port.name): port.accepts[0] for port in twin.stage.outputs().values()}

    def _append(self, name: str, stage: Stage, inputs: dict[str, Ref], why: str = "") -> Node:
        count = sum(node.name.partition("@")[0] == name for node in self.nodes)
        node = Node(f"{name}@{count + 1}" if count else name, stage, inputs, why)
        self.nodes.append(node)
        for port in stage.outputs().values():
            kind = self.types[inputs[port.follows]] if port.follows in inputs else port.accepts[0]
            ref = Ref(node.name, port.name)
            self.types[ref] = kind
            if issubclass(kind, Checkpoint):
                self.latest = ref
        return node

    @staticmethod
    def _model(inputs: Mapping[str, Ref]) -> Ref | None:
        return next((inputs[port] for port in LATEST_PORTS if port in inputs), None)

    def _wire(self, name: str, port: Port, written: str | None) -> Ref | None:
        """The output that feeds one port, converted if need be; None for an open optional port or after noting a problem."""
        if written is not None:
            ref = self._lookup(name, port, written)
        elif port.name in LATEST_PORTS and any(issubclass(kind, Checkpoint) for kind in port.accepts):
            ref = self.latest
        elif port.name == REFERENCE_PORT:
            ref = SOURCE_MODEL
        elif issubclass(port.accepts[0], Dataset) and port.name in self.recipe.data.splits:
            ref = Ref("data", port.name)
        elif port.optional:
            return None
        elif issubclass(port.accepts[0], Dataset):
            splits = ", ".join(self.recipe.data.splits) or "none"
            self.problems.append(
                f"data.splits: {name} needs a split `{port.name}`, there are: {splits}; write +data.splits.{port.name}=/file.jsonl"
            )
            return None
        else:
            self.problems.append(f"stages.{name}.inputs.{port.name}: not connected; write for example `{port.name}: model`")
            return None
        if ref is None or port.takes(self.types[ref]):
            return ref
        if self.types[ref] is QuantizedCheckpoint and port.takes(DenseCheckpoint):
            return self._convert(name, ref)
        instead = "name another output" if written else f"move {name} behind a stage that makes one, or leave it out"
        self.problems.append(
            f"stages.{name}.inputs.{port.name}: {port} is needed and {ref} is of type {self.types[ref].__name__}; {instead}"
        )
        return None

    def _lookup(self, name: str, port: Port, written: str) -> Ref | None:
        node, _, wanted = written.partition(".")
        if node == "model" and wanted in ("", "model"):
            return SOURCE_MODEL
        earlier = [n.name for n in self.nodes if n.name.partition("@")[0] == node or n.name == node]
        outputs = [ref for ref in self.types if ref.node == (earlier[-1] if earlier else node)]
        if wanted:
            found = [ref for ref in outputs if ref.port == wanted]
        else:  # of several outputs, the one that fits
            found = outputs if len(outputs) == 1 else [ref for ref in outputs if port.takes(self.types[ref])]
        if len(found) == 1:
            return found[0]
        self.problems.append(f"stages.{name}.inputs.{port.name}: {self._unknown(name, node, wanted, written)}")
        return None

    def _unknown(self, name: str, node: str, wanted: str, written: str) -> str:
        """Why `written` names no output before the stage `name`."""
        known = [str(ref) for ref in self.types]
        if wanted and node == "models":
            return f"there is no model '{wanted}' under `models`; write +models.{wanted}.path=/folder"
        if node in self.recipe.order and not any(ref.node == node for ref in self.types):
            return f"{node} comes later in `order`; move it before {name}" if node != name else f"{name} cannot read what it makes itself"
        return f"there is no '{written}' before it{did_you_mean(written, known)}"

    def _convert(self, name: str, ref: Ref) -> Ref | None:
        if self.recipe.convert == "never":
            self.problems.append(
                f"order: {name} needs a dense checkpoint and {ref} is quantized; move {name} before it, or write `convert: auto`"
            )
            return None
        why = f"{name} needs dense weights and {ref} is quantized"
        done = next((n for n in self.nodes if n.why and n.inputs == {"model": ref}), None)
        return Ref((done or self._append("dequantize", find_stage("dequantize")(), {"model": ref}, why)).name, "model")
