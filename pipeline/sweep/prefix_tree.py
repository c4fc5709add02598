"""What a sweep's jobs have in common: their plans as one tree, in which every stage execution stands once.

Two nodes of two plans are the same execution where their keys are equal. While a key is not known (a digest is pending, a library is
not installed here), the stage, its parameters and what it reads say whether they are.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from pipeline.artifact import MEASUREMENTS
from pipeline.graph import Ref, worked_on
from pipeline.identity import digest, non_default
from pipeline.plan import Plan, PlannedNode
from pipeline.plan_table import STATUS, estimate
from pipeline.recipe import SOURCES, Recipe
from pipeline.store import SHORT


@dataclass
class Branch:
    """One stage execution, and those that work on what it makes, by identity."""

    node: PlannedNode
    children: dict[str, "Branch"] = field(default_factory=dict)


class PrefixTree:
    """The plans of a sweep's jobs, as a tree. `roots` are executions that read nothing but sources."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        self.roots: dict[str, Branch] = {}
        self.branches: dict[str, Branch] = {}  # every distinct execution, by identity
        self.jobs = 0
        self.executions = 0  # of all jobs, had they nothing in common
        for plan in plans:
            self._add(plan)

    def _add(self, plan: Plan) -> None:
        found = identities(plan)
        self.jobs += 1
        self.executions += len(set(found.values()))
        for node in plan.nodes:
            identity = found[node.name]
            if identity not in self.branches:
                self.branches[identity] = Branch(node)
                upstream = _upstream(node)
                (self.branches[found[upstream]].children if upstream else self.roots)[identity] = self.branches[identity]

    @property
    def to_run(self) -> list[PlannedNode]:
        return [branch.node for branch in self.branches.values() if branch.node.status != "hit"]

    @property
    def seconds(self) -> float | None:
        """Planned, of what is to run, one after the other; None where that of one is not known."""
        known = [node.seconds for node in self.to_run if node.seconds is not None]
        return sum(known) if len(known) == len(self.to_run) else None

    def sentences(self) -> list[str]:
        """`6 jobs: 15 stage executions instead of 24; 3 are in the store, 12 are to run`, and how long that takes."""
        hits = len(self.branches) - len(self.to_run)
        shared = f"{len(self.branches)} stage executions instead of {self.executions}"
        told = [f"{self.jobs} jobs: {shared}; {hits} are in the store, {len(self.to_run)} are to run"]
        if self.to_run and self.seconds is None:
            told.append("planned time: not known, since a stage or its machine does not say enough")
        elif self.seconds:
            told.append(f"planned time: {estimate(self.seconds)}, one after the other")
        return told

    def tree(self, title: str) -> Tree:
        """For the terminal: what makes a model is bold, what only measures is not."""
        shown = Tree(escape(title), guide_style="dim")
        _show(self.roots, shown)
        return shown

    def content(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "jobs": self.jobs,
            "executions": {"without_sharing": self.executions, "distinct": len(self.branches), "to_run": len(self.to_run)},
            "seconds": self.seconds,
            "tree": _content(self.roots),
        }


def prefix_rank(plans: Sequence[Plan]) -> list[tuple[int, ...]]:
    """For each plan, what to sort by so that plans with the same first stages follow each other, else as they come.

    Only what makes something counts, not what measures it.
    """
    first_seen: dict[str, int] = {}
    ranks = []
    for plan in plans:
        found = identities(plan)
        path = [found[node.name] for node in plan.nodes if not _measures(node)]
        ranks.append(tuple(first_seen.setdefault(identity, len(first_seen)) for identity in path))
    return ranks


def identities(plan: Plan) -> dict[str, str]:
    """What is equal for two nodes where they are one execution, by the name of the node."""
    sources = {ref: artifact.key or digest("source", [str(ref), _written(plan.recipe, ref)]) for ref, artifact in plan.sources.items()}
    found: dict[str, str] = {}
    for node in plan.nodes:
        read = {port: sources[ref] if ref.node in SOURCES else f"{found[ref.node]}.{ref.port}" for port, ref in node.inputs.items()}
        unkeyed = {"stage": node.stage.name, "params": non_default(node.stage.params), "inputs": read}
        found[node.name] = node.key or digest("execution", unkeyed)
    return found


def _written(recipe: Recipe, ref: Ref) -> Any:
    """What the recipe says of a source."""
    if ref.node == "data":
        return recipe.data.splits[ref.port].model_dump(mode="json")
    return (recipe.model if ref.node == "model" else recipe.models[ref.port]).model_dump(mode="json")


def _upstream(node: PlannedNode) -> str:
    """The node that it hangs below: that which made its model, else the first that it reads from; empty where it reads sources alone."""
    made = [ref.node for ref in node.inputs.values() if ref.node not in SOURCES]
    model = worked_on(node.inputs)
    if model is not None:
        return model.node if model.node in made else ""
    return made[0] if made else ""


def _measures(node: PlannedNode) -> bool:
    return all(issubclass(kind, MEASUREMENTS) for kind in node.types.values())


def _show(branches: Mapping[str, Branch], onto: Tree) -> None:
    for branch, label in zip(branches.values(), _labels(branches), strict=True):
        node = branch.node
        name = escape(label) if _measures(node) else f"[bold]{escape(label)}[/bold]"
        planned = f"  {estimate(node.seconds)}" if node.seconds and node.status != "hit" else ""
        _show(branch.children, onto.add(f"{name}  {STATUS[node.status]}{planned}"))


def _content(branches: Mapping[str, Branch]) -> list[dict[str, Any]]:
    return [
        {
            "name": label,
            "stage": branch.node.stage.name,
            "key": branch.node.key,
            "status": branch.node.status,
            "seconds": branch.node.seconds,
            "children": _content(branch.children),
        }
        for branch, label in zip(branches.values(), _labels(branches), strict=True)
    ]


def _labels(branches: Mapping[str, Branch]) -> list[str]:
    """The stages' names in the recipe; where siblings share one, with what tells them apart: `quantize (num_bits=3)`."""
    nodes = [branch.node for branch in branches.values()]
    labels = []
    for node in nodes:
        alike = [other for other in nodes if _name(other) == _name(node)]
        same_stage = [_facts(other) for other in alike if other.stage.name == node.stage.name]
        told = [node.stage.name] if len(same_stage) < len(alike) else []
        told += [f"{key}={value}" for key, value in _facts(node).items() if any(facts.get(key) != value for facts in same_stage)]
        if same_stage.count(_facts(node)) > 1:  # they read different sources of the same name
            told.append(node.key[:SHORT] or "digest pending")
        labels.append(f"{_name(node)} ({', '.join(told)})" if told else _name(node))
    return labels


def _name(node: PlannedNode) -> str:
    return node.name.partition("@")[0]


def _facts(node: PlannedNode) -> dict[str, str]:
    params = {name: json.dumps(value).strip('"') for name, value in node.stage.params.model_dump(mode="json").items()}
    return params | {port: str(ref) for port, ref in node.inputs.items()}
