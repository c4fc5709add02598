"""LoRA in numbers: which layers get an adapter, how large it is, and what a frozen NF4 base costs. Needs no torch: a plan reads it.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) adds to each frozen weight W [out, in] a product of two thin matrices,
W + (lora_alpha / rank) * B A with A [rank, in] and B [out, rank], and trains only those. QLoRA (Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314) holds W in NF4 meanwhile: 4 bits a weight, an fp32 maximum for every block of 64 weights, and
with double quantization that maximum in 8 bits with an fp32 scale for every 256 blocks.
"""

import math

from pipeline.artifact import AdapterSpec
from pipeline.headers import ITEM_BYTES
from pipeline.layout import ModuleGroup
from pipeline.spec import ModelSpec
from stages.runtime.training_settings import LoRAParams, TrainingExecution, TrainingParams, loss_bytes

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # every Linear layer of a decoder layer
NF4_BLOCK = 64  # weights that share a maximum ...
NF4_OUTER_BLOCK = 256  # ... and maxima that share a scale
NF4_CODES = 16 + 256  # fp32 values of the two code books that every layer carries


class LoRATraining(TrainingParams, LoRAParams):
    """What training adapters takes."""

    @property
    def item(self) -> int:
        """Bytes of a value in the computation."""
        return ITEM_BYTES["BF16" if self.dtype == "bf16" else "F32"]


def target_groups(model: ModelSpec) -> list[ModuleGroup]:
    """The groups of layers that get an adapter."""
    return [group for group in model.linear_groups if group.name.rpartition(".")[2] in LORA_TARGETS]


def check_rank(model: ModelSpec, rank: int) -> None:
    """ValueError where some targeted weight has no room for that rank: more trained numbers would express no more."""
    smallest = min(target_groups(model), key=lambda group: min(group.shape))
    side = min(smallest.shape)
    if rank > side:
        name = smallest.name.replace("{layer}", "*")
        raise ValueError(f"rank: {rank} is more than the smaller side of {name} {list(smallest.shape)}; write {side} or less")


def adapter_spec(model: ModelSpec, rank: int) -> AdapterSpec:
    """The adapter of that rank for every decoder Linear layer, in fp32 as it is trained and saved. ValueError: see `check_rank`."""
    check_rank(model, rank)
    parameters = sum(group.count * rank * (group.shape[0] + group.shape[1]) for group in target_groups(model))
    return AdapterSpec(rank=rank, num_parameters=parameters, nbytes=parameters * ITEM_BYTES["F32"])


def nf4_bytes(model: ModelSpec, double_quant: bool, item: int = 2) -> int:
    """The frozen base in memory: decoder Linear weights in NF4, everything else in `item` bytes a value."""
    total = 0
    targets = {group.name for group in target_groups(model)}
    for group in model.groups:
        weights = math.prod(group.shape)
        if group.name in targets:
            total += group.count * (quantized_bytes(weights, double_quant) + item * group.bias * group.shape[0])
        else:
            total += group.count * item * weights
    return total


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Of one layer: about 0.5 + 1/64 + 4/(64 * 256) bytes a weight, 0.5 + 4/64 without double quantization."""
    blocks = math.ceil(weights / NF4_BLOCK)
    statistics = blocks + 4 * math.ceil(blocks / NF4_OUTER_BLOCK) + 4 if double_quant else 4 * blocks
    codes = 4 * (NF4_CODES if double_quant else 16)
    return math.ceil(weights / 2) + statistics + codes


def batch_memory(params: LoRATraining, execution: TrainingExecution, model: ModelSpec) -> dict[str, int]:
    """What comes and goes with each micro batch."""
    shape, item = model.architecture, params.item
    tokens = min(execution.micro_batch_size, params.global_batch_size) * params.max_length
    layer = tokens * kept_bytes(params, model)
    kept, computed = (shape.hidden_size * item * tokens, layer) if execution.gradient_checkpointing else (layer, 0)
    largest = max(math.prod(group.shape) for group in target_groups(model))
    return {
        "activations": shape.num_layers * kept + computed,
        "gradients of one layer's activations": layer // 2,
        "one weight, dequantized": 2 * largest * item,
        "logits of a chunk of tokens": loss_bytes(model),
    }


def kept_bytes(params: LoRATraining, model: ModelSpec) -> int:
    """Of one token in one decoder layer, kept for the backward pass; counted from what autograd saves in transformers' Llama."""
    shape = model.architecture
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    mixed = 18 * hidden + 6 * queries + 4 * keys + 8 * inner  # a norm keeps its input in fp32, a LoRA pair its own copy of the input
    kept = mixed if params.dtype == "bf16" else 16 * hidden + 8 * queries + 8 * keys + 16 * inner
    dropped = (params.item + 2) * (5 * hidden + queries + inner) if params.lora_dropout else 0
    return kept + dropped + 7 * params.item * params.rank + 4 * shape.num_heads
