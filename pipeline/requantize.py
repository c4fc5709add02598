"""Where an order quantizes and ends in dense weights nevertheless, `requantize: true` rounds the result once more.

    order: [quantize, prune, evaluate]   becomes   quantize, dequantize, prune, requantize, evaluate

Pipelines that differ in their order then end at comparable bits. The node `requantize` is round-to-nearest with the bits, group size,
symmetry and ignored layers of the order's last quantizer, whichever that is. It stands before whatever at the end of the order leaves
the weights as they are: stages that measure then measure what it makes, and a KV cache is calibrated with the weights that are served.
"""

from pipeline.artifact import Checkpoint, DenseCheckpoint, QuantizedCheckpoint
from pipeline.graph import Graph, Node
from pipeline.recipe import Recipe
from pipeline.stage import Stage, find_stage
from pipeline.validated import validated
from pipeline.wiring import Wiring

REQUANTIZE, MIXED = "requantize", "mixed_precision"
FORMAT = ("num_bits", "group_size", "symmetric", "ignore")


def end_of_changes(recipe: Recipe) -> int:
    """Place in `order` from which on no stage changes weights; its length where the last one does, or is not known."""
    end = len(recipe.order)
    while end and (config := recipe.stages.get(recipe.order[end - 1])) and _leaves_weights(config.stage):
        end -= 1
    return end


def requantize(wiring: Wiring) -> None:
    """Append the node where the latest checkpoint is dense and a stage before it quantizes. An order without such a stage stays as
    it is; to a recipe without one the setting means nothing, which is a problem."""
    if not any(_quantizes(config.stage) for config in wiring.recipe.stages.values()):
        wiring.problems.append(f"{REQUANTIZE}: no stage of the recipe quantizes; remove it, or add one (+stage@stages.quantize=gptq)")
    last = _last_quantizer(wiring.nodes)
    if last is None or not issubclass(wiring.types[wiring.latest], DenseCheckpoint):
        return
    rtn = find_stage("rtn")
    if getattr(last.stage.params, MIXED, None):
        wiring.problems.append(
            f"{REQUANTIZE}: {last.name} gives each layer its own bits, as measured before its weights were changed again; put the stages "
            "sensitivity and rtn at the end of `order` instead"
        )
        return
    missing = [name for name in FORMAT if not hasattr(last.stage.params, name)]
    if missing:
        wiring.problems.append(
            f"{REQUANTIZE}: {last.stage.name} has no {' and no '.join(missing)} to round with; put a stage rtn at the end of `order`"
        )
        return
    params = validated(rtn.Params, {name: getattr(last.stage.params, name) for name in FORMAT}, REQUANTIZE, wiring.problems)
    if params is not None:
        why = f"{wiring.latest} is dense; rounded to nearest, in the format of {last.name}"
        wiring.append(wiring.numbered(REQUANTIZE), rtn(params), {"model": wiring.latest}, why)


def left_dense(node: Node, graph: Graph) -> list[str]:
    """A sentence for the plan, where that node makes the pipeline's final checkpoint, a dense one, and another one quantizes."""
    last = _last_quantizer(graph.nodes)
    if last is None or node.name != graph.final.node or not issubclass(graph.types[graph.final], DenseCheckpoint):
        return []
    return [f"the result is dense although {last.name} stands in the order; write {REQUANTIZE}: true to round it at the end"]


def configured(node: Node, graph: Graph) -> Node:
    """The node whose entry under `stages` sets the parameters of this one: of an inserted `requantize` its quantizer, else itself."""
    inserted = node.why and node.name.partition("@")[0] == REQUANTIZE
    return _last_quantizer([other for other in graph.nodes if other is not node]) or node if inserted else node


def _last_quantizer(nodes: list[Node] | tuple[Node, ...]) -> Node | None:
    return next((node for node in reversed(nodes) if _quantizes(node.stage)), None)


def _quantizes(stage: Stage) -> bool:
    """Whether it packs dense weights; one whose output is of its input's type does not."""
    return any(issubclass(port.accepts[0], QuantizedCheckpoint) and not port.follows for port in stage.outputs().values())


def _leaves_weights(stage: Stage) -> bool:
    """Whether it makes no model, or the one that it is given with something beside the weights."""
    made = [port for port in stage.outputs().values() if issubclass(port.accepts[0], Checkpoint)]
    return all(port.follows and stage.keeps_weights for port in made)
