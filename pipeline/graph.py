"""A recipe as a graph: nodes, each one execution of a stage, and the outputs that feed them. Built by pipeline/wiring.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.artifact import Artifact
from pipeline.recipe import SOURCES
from pipeline.stage import Stage

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
    """One execution of a stage in the graph. `why` says how a node came in that the recipe's order does not name. `derived` spares it
    work on its inputs, and changes nothing of what it makes (pipeline/shared_passes.py)."""

    name: str
    stage: Stage
    inputs: Mapping[str, Ref]
    why: str = ""
    derived: Mapping[str, Ref] = field(default_factory=dict)


def worked_on(inputs: Mapping[str, Ref]) -> Ref | None:
    """The model that a node with these inputs works on, where it works on one."""
    return next((inputs[port] for port in LATEST_PORTS if port in inputs), None)


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
