"""The abstract evaluation of a recipe: every node's key, spec, memory and whether it is already done, from shapes alone.

A plan needs no weights, no torch and well under a second. The executor takes only a `Plan`, so the plan and the run cannot disagree:
`expected` is what the guard holds each finished artifact to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.artifact import Artifact, Spec
from pipeline.graph import Graph, Ref
from pipeline.recipe import Recipe
from pipeline.stage import Stage
from pipeline.target import Memory

Status = Literal["hit", "miss", "pending"]


@dataclass(frozen=True)
class PlannedNode:
    """One node, evaluated. `key` is empty while a source's digest is pending."""

    name: str
    stage: Stage
    inputs: Mapping[str, Ref]
    input_keys: Mapping[str, str]  # upstream keys by port
    key: str
    types: Mapping[str, type[Artifact]]  # of its outputs, by port
    expected: Mapping[str, Spec]  # specs of its outputs, by port
    memory: Memory
    status: Status
    reason: str  # of a miss; why it was inserted is in `notes`
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Nodes in the order they run. `sources` are the artifacts that `model` and `data.<split>` stand for."""

    recipe: Recipe
    graph: Graph
    digest: str  # of the recipe; names the run's folder
    nodes: tuple[PlannedNode, ...]
    sources: Mapping[Ref, Artifact]

    @property
    def final(self) -> Ref:
        return self.graph.final
