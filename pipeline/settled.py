"""A plan while it runs: what it could only bound becomes exact as soon as what decides it is measured (pipeline/bounds.py)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pipeline.artifact import Artifact
from pipeline.graph import Ref
from pipeline.plan import Plan, PlannedNode


def settled_node(plan: Plan, node: PlannedNode, made: Mapping[Ref, Artifact]) -> PlannedNode:
    """The node with what its inputs, which are among `made`, say of it. Memory and time stay those of the bound."""
    if not node.bound:
        return node
    planned = {Ref(other.name, port): spec for other in plan.nodes for port, spec in other.expected.items()}
    planned |= {ref: source.spec for ref, source in plan.sources.items()}
    before = node.stage.explain(**{port: planned[ref] for port, ref in node.inputs.items()})
    specs = {port: made[ref].spec for port, ref in node.inputs.items()}
    inferred, ports = node.stage.infer(**specs), list(node.types)
    expected = {ports[0]: inferred} if len(ports) == 1 else {port: getattr(inferred, port) for port in ports}
    notes = (*(note for note in node.notes if note not in before), *node.stage.explain(**specs))
    return replace(node, expected=expected, notes=notes)


def settled_plan(plan: Plan, finished: Iterable[PlannedNode]) -> Plan:
    """The plan with what became known of the nodes that finished."""
    known = {node.name: node for node in finished}
    return replace(plan, nodes=tuple(known.get(node.name, node) for node in plan.nodes))
