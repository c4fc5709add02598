"""What forward passes over windows of text need and take, models resident or one layer at a time. Needs no torch: a plan reads it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.headers import ITEM_BYTES
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from stages.runtime.layerwise_settings import LayerwiseExecution
from stages.runtime.peak_memory import freed_activations, layer_bytes, resident_memory, widest
from stages.runtime.scheme import unpacking_memory
from stages.runtime.stage_work import TOKEN_BYTES, flowing, forward_flops, reading
from stages.runtime.windows import HIDDEN_STATES


class Forward(NamedTuple):
    """A view of a model that computes. `loads`: its weights are not those of another one that computes beside it."""

    name: str
    spec: ModelSpec
    loads: bool = True


class ForwardMemory(NamedTuple):
    """`held` is in RAM, `items` where it computes. `phases` follow each other there: resident there is one, whose blocks are kept."""

    held: dict[str, int]
    items: dict[str, int]
    phases: list[dict[str, int]]


def row_bytes(spec: ModelSpec) -> int:
    """Of one token's hidden states, or of a word's row of the output embedding."""
    return spec.architecture.hidden_size * ITEM_BYTES[spec.dtype]


def has_plain_head(spec: ModelSpec) -> bool:
    """Whether its output embedding multiplies hidden states as they are: formats of 8 bits may round them first."""
    return not any(group.name == "lm_head" and group.format.rounds_inputs for group in spec.groups)


def head_bytes(spec: ModelSpec) -> int:
    return spec.architecture.vocab_size * row_bytes(spec)


def forward_memory(views: Sequence[Forward], execution: LayerwiseExecution, window: int, text: DatasetSpec, on_gpu: bool) -> ForwardMemory:
    """Of models that compute one after the other, up to their output embeddings; specs are as they are in memory."""
    if not views:
        return ForwardMemory({}, {}, [])
    tokens, resident = execution.batch_size * window, execution.mode == "resident"
    items: dict[str, int] = {}
    computing = []
    for name, spec, _ in views:
        shape, item = spec.architecture, ITEM_BYTES[spec.dtype]
        computing.append(tokens * widest(shape) * item)
        if spec.kv_cache.mode:
            layers = shape.num_layers if resident else 1
            items[f"{name}, INT8 cache"] = tokens * spec.kv_cache.bytes_per_token * layers // shape.num_layers
            computing[-1] += 2 * tokens * shape.num_kv_heads * shape.head_dim * (item + 4)  # one layer's, dequantized by way of fp32
    activations = {"activations of one layer": max(computing)}
    if resident:
        parts = [resident_memory(name, spec, on_gpu) for name, spec, loads in views if loads]
        held = {name: size for ram, _ in parts for name, size in ram.items()}
        return ForwardMemory(held, {name: size for _, there in parts for name, size in there.items()} | items, [activations])
    states = sum(row_bytes(spec) * math.ceil(text.nbytes / TOKEN_BYTES) for _, spec, _ in views)
    held = {"hidden states of the text in flight": min(execution.hidden_states or HIDDEN_STATES, states)}
    items["freed blocks that the allocator keeps"] = max(freed_activations(spec, tokens) for _, spec, _ in views)
    layer = {"the largest decoder layer": max(layer_bytes(spec) for _, spec, _ in views)}
    unpacking = {"a weight being unpacked": max(unpacking_memory(spec) for _, spec, _ in views)}
    return ForwardMemory(held, items, [layer | activations, layer | unpacking])


def forward_work(
    views: Sequence[Forward], computing: Computing, execution: LayerwiseExecution, tokens: float, window: int, head: bool = True
) -> Work:
    """Of `tokens` tokens; with `head`, their logits too. Layer by layer, the weights are read for each text that is in flight together."""
    work = computing.products(sum(forward_flops(spec, tokens, window, head) for _, spec, _ in views))
    work = sum((flowing(spec, tokens, window) for _, spec, _ in views), work)
    if execution.mode == "resident":
        return sum((reading(spec) for _, spec, loads in views if loads), work)
    states = tokens * sum(row_bytes(computing.in_memory(spec)) for _, spec, _ in views)
    sweeps = math.ceil(states / (execution.hidden_states or HIDDEN_STATES))
    return sum((reading(spec, sweeps) for _, spec, _ in views), work)
