"""LoRA in numbers: which layers get an adapter, how large it is, and what a frozen NF4 base costs. Needs no torch: a plan reads it.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) adds to each frozen weight W [out, in] a product of two thin matrices,
W + (lora_alpha / rank) * B A with A [rank, in] and B [out, rank], and trains only those. QLoRA (Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314) holds W in NF4 meanwhile: 4 bits a weight, an fp32 maximum for every block of 64 weights, and
with double quantization that maximum in 8 bits with an fp32 scale for every 256 blocks.
"""

import math

from pipeline.artifact_spec import AdapterSpec
from pipeline.headers import ITEM_BYTES
from pipeline.layout import ModuleGroup
from pipeline.spec import ModelSpec
from stages.runtime.training_settings import LoRAParams, TrainingParams

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # every Linear layer of a decoder layer
NF4_BLOCK = 64  # weights that share a maximum ...
NF4_OUTER_BLOCK = 256  # ... and maxima that share a scale
NF4_CODES = 16 + 256  # fp32 values of the two code books that every layer carries


class LoRATraining(TrainingParams, LoRAParams):
    """What training adapters takes."""


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


def loading_memory(model: ModelSpec, double_quant: bool, item: int = 2) -> dict[str, int]:
    """While the base is loaded on a CPU: transformers maps the checkpoint's files, and their pages stay until every weight is read.

    The system takes such pages back where memory is short; until then they are the process's. (Beside a GPU they are not counted.)
    """
    largest = max(math.prod(group.shape) for group in target_groups(model))
    return {
        "the base in NF4, as it grows": nf4_bytes(model, double_quant, item),
        "the files that it is read from": model.nbytes,
        "one weight in float32": 4 * largest,
    }


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Of one layer: about 0.5 + 1/64 + 4/(64 * 256) bytes a weight, 0.5 + 4/64 without double quantization."""
    blocks = math.ceil(weights / NF4_BLOCK)
    statistics = blocks + 4 * math.ceil(blocks / NF4_OUTER_BLOCK) + 4 if double_quant else 4 * blocks
    codes = 4 * (NF4_CODES if double_quant else 16)
    return math.ceil(weights / 2) + statistics + codes
