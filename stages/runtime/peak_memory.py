"""What the stages' memory has in common: the phase that takes most, a decoder layer's size, what loading and malloc add.

Needs no torch: a plan reads it. A layer of experts holds all of them, whichever a token visits: `layer_bytes` of Mixtral 8x7B is
2.9 GB, of which its attention is 84 MB. Layers can differ (some are dense, some modules are ignored): each is summed, the largest counts.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

from pipeline.architecture import Architecture
from pipeline.headers import ITEM_BYTES
from pipeline.layout import ModuleGroup
from pipeline.spec import ModelSpec

HEAP_BLOCKS = (128 << 10, 32 << 20)  # sizes between which glibc puts a block into its heap, once such blocks have been freed


def peak(*phases: dict[str, int]) -> dict[str, int]:
    """Of phases that follow each other the one that takes most; the first where they are equal."""
    return max(phases, key=lambda phase: sum(phase.values()))


def largest_layer(groups: Iterable[ModuleGroup], size: Callable[[ModuleGroup], int]) -> int:
    """Of all decoder layers the largest sum of `size`, which is that of one module of a group. 0 where none has such modules."""
    layers: Counter[int] = Counter()
    for group in groups:
        each = size(group) * max(1, len(group.experts))
        for layer in group.layers:
            layers[layer] += each
    return max(layers.values(), default=0)


def layer_bytes(model: ModelSpec) -> int:
    """Of the Linear weights of one decoder layer, dense."""
    return ITEM_BYTES[model.dtype] * largest_layer(model.linear_groups, lambda group: math.prod(group.shape))


def inner_width(shape: Architecture) -> int:
    """Neurons of the MLP that compute on one token: of experts, those of all that it visits."""
    experts = shape.experts
    if experts is None:
        return shape.intermediate_size
    dense = shape.intermediate_size if experts.dense_layers else 0
    return max(dense, experts.per_token * experts.intermediate_size)


def widest(shape: Architecture) -> int:
    """Values of one token that a decoder layer holds at its peak, in the MLP or in the attention.

    Around both: what came into the layer, what the attention made of it, and that normalised. In the MLP gate, up and their product; in
    the attention queries, keys and values, and the first two once more while they are rotated, half of them negated in a third copy.
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 3 * shape.hidden_size + max(3 * inner_width(shape), 3 * queries + 4 * keys)


def freed_activations(model: ModelSpec, tokens: int) -> int:
    """Of what `widest` counts for that many tokens, the bytes that malloc keeps between layers: those in blocks of its heap."""
    a, item = model.architecture, ITEM_BYTES[model.dtype]
    inner, queries, keys = inner_width(a), a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    in_heap = {width: width * (tokens * width * item < HEAP_BLOCKS[1]) for width in (a.hidden_size, inner, queries, keys)}
    values = 3 * in_heap[a.hidden_size] + max(3 * in_heap[inner], 3 * in_heap[queries] + 4 * in_heap[keys])
    return tokens * item * values


def resident_memory(name: str, model: ModelSpec, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
    """(in RAM beside a GPU, where it computes) of a model that transformers loads whole.

    Packed weights are unpacked in RAM wherever the model then goes. Their files stay mapped as long as it lives, because what is dense
    in them (embeddings) is used there; pages of a dense model's files are the model itself, until it is moved.
    """
    item, packed = ITEM_BYTES[model.dtype], [group for group in model.groups if not group.format.is_dense]
    dense = {f"{name}, dense": model.dense().nbytes}
    if not packed:
        return {}, dense
    if all(group.format.layout == "llm_int8" for group in packed):  # bitsandbytes multiplies int8 weights as they are
        return {}, {f"{name}, int8": model.nbytes}
    unpacked = sum(item * group.count * math.prod(group.shape) for group in packed)
    files = {f"{name}, packed, in its mapped files": model.nbytes - (model.dense().nbytes - unpacked)}
    return ({f"{name}, unpacked before it is moved": unpacked} | files, dense) if on_gpu else ({}, dense | files)


def kept_by_malloc(model: ModelSpec) -> int:
    """Bytes of dense weights that stay the process's after they are freed: glibc returns the heap from its top only.

    Blocks of 128 KiB and more begin as mappings of their own, which are returned; but each that is freed raises the limit to its size,
    and up to 32 MiB such blocks come from the heap from then on (mallopt(3), M_MMAP_THRESHOLD). Measured with gptq and a model
    of 260 MB: with every tensor gone the process had what it had before, and malloc_trim then gave 331 MB of it back.
    """
    sizes = ((ITEM_BYTES[model.dtype] * math.prod(group.shape), group.count) for group in model.dense().groups)
    return sum(size * count for size, count in sizes if HEAP_BLOCKS[0] <= size < HEAP_BLOCKS[1])
