"""No forward pass twice: what several stages of a plan would compute of one model and one text is computed once, stored, and read by each.

    what each evaluation is about                      what each node then computes
                                                       hidden_states@source     source
    evaluate@source   source                           evaluate@source
                                                       hidden_states@quantize   quantize
    evaluate          quantize, source                 evaluate
    evaluate@2        kv_cache, quantize, source       evaluate@2               kv_cache

Stages say which passes they make (`Stage.passes`). A pass that is made once is not stored, and nothing is where all who would read it are
in the store already: what is derived is no part of a key, so a plan may do without it at any time. A model that was only given an INT8
cache has the weights of the one it was made of; without its cache it computes what that one does.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from pipeline.artifact_spec import Spec
from pipeline.evidence import SOURCE
from pipeline.graph import SOURCE_MODEL, Graph, Node, Ref, worked_on
from pipeline.identity import canonical
from pipeline.recipe import SOURCES
from pipeline.spec import ModelSpec
from pipeline.stage import Stage, find_stage


@dataclass
class _Shared:
    """A pass: the stage that would store it, on what, and who makes it, by the ports that it would come in by."""

    stage: Stage
    inputs: dict[str, Ref]
    makers: list[tuple[Node, str]]


def share_passes(graph: Graph, specs: Mapping[Ref, Spec], to_run: Collection[str]) -> Graph:
    """The graph with a node for each pass that is made more than once, before the first of the nodes `to_run` that make it.

    `specs` are those of all outputs and sources.
    """
    shared = [each for each in _passes(graph, specs) if len(each.makers) > 1 and any(node.name in to_run for node, _ in each.makers)]
    nodes, types = list(graph.nodes), dict(graph.types)
    for each in shared:
        first = next(n for n, (node, _) in enumerate(each.makers) if node.name in to_run)
        readers = each.makers[first:]
        name, count_of = _name(each, nodes), len({node.name for node, _ in readers})
        why = f"computed once for {count_of} evaluation{'s' if count_of > 1 else ''}"
        nodes.insert(_place(readers[0][0], nodes), Node(name, each.stage, each.inputs, why))
        [(output, port)] = each.stage.outputs().items()
        types[Ref(name, output)] = port.accepts[0]
        for reader, wanted in readers:
            number = _place(reader, nodes)
            nodes[number] = replace(nodes[number], derived={**nodes[number].derived, wanted: Ref(name, output)})
    return Graph(tuple(nodes), graph.final, types)


def _passes(graph: Graph, specs: Mapping[Ref, Spec]) -> list[_Shared]:
    """Every distinct pass, in the order in which they are first made."""
    found: dict[str, _Shared] = {}
    for node in graph.nodes:
        for port, made in node.stage.passes(**{port: specs[ref] for port, ref in node.inputs.items()}).items():
            inputs = {name: node.inputs[own] for name, own in made.inputs.items()}
            model = worked_on(inputs)
            if made.plain and model is not None:
                plain = _without_cache(model, graph, specs)
                if plain is None:
                    continue
                inputs = {name: plain if ref == model else ref for name, ref in inputs.items()}
            stage = find_stage(made.stage).from_dict(made.params, made.execution)
            same = canonical([made.stage, stage.params.model_dump(mode="json"), {name: str(ref) for name, ref in inputs.items()}])
            found.setdefault(same, _Shared(stage, inputs, [])).makers.append((node, port))
    return list(found.values())


def _without_cache(model: Ref, graph: Graph, specs: Mapping[Ref, Spec]) -> Ref | None:
    """The model with these weights and the ordinary cache, where this one was made by giving it another one."""
    cached = specs[model]
    assert isinstance(cached, ModelSpec), "the output is a model"
    while (node := next((node for node in graph.nodes if node.name == model.node), None)) is not None:
        given = node.stage.outputs()[model.port].follows
        if given is None or not node.stage.keeps_weights:
            return None
        model = node.inputs[given]
        if specs[model] == cached.with_cache(None):
            return model
    return None


def _place(node: Node, nodes: Sequence[Node]) -> int:
    return next(n for n, other in enumerate(nodes) if other.name == node.name)


def _name(shared: _Shared, nodes: Sequence[Node]) -> str:
    """`hidden_states@quantize`, `hidden_states@source`."""
    model = worked_on(shared.inputs) or next(iter(shared.inputs.values()))
    place = SOURCE if model == SOURCE_MODEL else model.port if model.node in SOURCES else model.node
    taken, name = {node.name for node in nodes}, f"{shared.stage.name}@{place}"
    return next(label for n in count(1) if (label := name if n == 1 else f"{name}@{n}") not in taken)
