"""Ports wired and types checked: a recipe's `order` becomes a graph of nodes, or every reason why it cannot.

Default wiring, so that a recipe reads like a sentence:
    model, student   the latest checkpoint before it, or export if it takes one (reports are skipped)
    reference        the source model
    a Dataset port   the split of the same name, `calibration` <- data.calibration
    anything else    must be named under `inputs`: `teacher: model` is the source model, `teacher: models.large` another model that
                     the recipe names, `prune.model` an output of a node

Legal order is a subtype relation. Where a dense checkpoint is needed and a quantized one comes, the named conversion
`dequantize` is inserted (`convert: never` makes it an error). A name that stands twice in `order` makes nodes `prune` and
`prune@2`; a bare reference means the nearest earlier one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count as count_from

from pipeline.artifact import MODELS, Artifact, Checkpoint, Dataset, DenseCheckpoint, Export, QuantizedCheckpoint
from pipeline.errors import did_you_mean
from pipeline.graph import LATEST_PORTS, REFERENCE_PORT, SOURCE_MODEL, Node, Ref, worked_on
from pipeline.recipe import Recipe
from pipeline.stage import Port, Stage, find_stage


@dataclass
class Wiring:
    """A graph in the making: nodes are added in the order they run. What is wrong is added to `problems`, and a node whose input could
    not be wired lacks it, so that the rest can still be checked.
    """

    recipe: Recipe
    sources: Mapping[Ref, type[Checkpoint]]
    problems: list[str]
    nodes: list[Node] = field(default_factory=list)
    latest: Ref = SOURCE_MODEL  # checkpoint or export
    checkpoint: Ref = SOURCE_MODEL  # the latest one

    def __post_init__(self) -> None:
        self.types: dict[Ref, type[Artifact]] = dict(self.sources)
        self.types |= {Ref("data", split): Dataset for split in self.recipe.data.splits}

    def add(self, name: str) -> None:
        """The stage `name` of the recipe, on what comes before it."""
        config = self.recipe.stages.get(name)
        if config is None:
            self.problems.append(f"order: '{name}' is not under `stages`{did_you_mean(name, self.recipe.stages)}")
            return
        ports = config.stage.inputs()
        for unknown in sorted(set(config.inputs) - set(ports)):
            if unknown in config.stage.unused():
                told = f"these parameters leave it unused; remove it (on the command line: ~stages.{name}.inputs.{unknown})"
            else:
                told = f"{config.stage.name} has no such input{did_you_mean(unknown, ports)}"
            self.problems.append(f"stages.{name}.inputs.{unknown}: {told}")
        inputs = self.inputs(name, config.stage, config.inputs)
        self.append(self.numbered(name), config.stage, inputs)

    def inputs(self, name: str, stage: Stage, written: Mapping[str, str]) -> dict[str, Ref]:
        """What feeds each port that can be wired. The source model is not compared with itself."""
        found = {port.name: ref for port in stage.inputs().values() if (ref := self._wire(name, port, written.get(port.name))) is not None}
        if REFERENCE_PORT not in written and worked_on(found) == SOURCE_MODEL:
            found.pop(REFERENCE_PORT, None)
        return found

    def numbered(self, name: str) -> str:
        """`prune`, then `prune@2`."""
        taken = {node.name for node in self.nodes}
        return next(label for count in count_from(1) if (label := f"{name}@{count}" if count > 1 else name) not in taken)

    def append(self, name: str, stage: Stage, inputs: Mapping[str, Ref], why: str = "", at: int | None = None) -> Node:
        """A node with these inputs, last or at that place. The latest checkpoint or export is its own, if it makes one."""
        node = Node(name, stage.given({port: self.types[ref] for port, ref in inputs.items()}), inputs, why)
        self.nodes.insert(len(self.nodes) if at is None else at, node)
        for port in stage.outputs().values():
            kind = self.types[inputs[port.follows]] if port.follows and port.follows in inputs else port.accepts[0]
            ref = Ref(node.name, port.name)
            self.types[ref] = kind
            if issubclass(kind, MODELS):
                self.latest = ref
                self.checkpoint = self.checkpoint if issubclass(kind, Export) else ref
        return node

    def _wire(self, name: str, port: Port, written: str | None) -> Ref | None:
        """The output that feeds one port, converted if need be; None for an open optional port or after noting a problem."""
        if written is not None:
            ref = self._lookup(name, port, written)
        elif port.name in LATEST_PORTS and any(issubclass(kind, MODELS) for kind in port.accepts):
            ref = self.latest if port.takes(self.types[self.latest]) else self.checkpoint
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
        same = next((node for node in self.nodes if node.why and node.inputs == {"model": ref}), None)
        if same is None:
            same = self.append(self.numbered("dequantize"), find_stage("dequantize")(), {"model": ref}, why)
        return Ref(same.name, "model")
