"""The settings every weight quantizer shares, and what they do to a model's spec. Needs no torch: a plan reads it.

A scheme here is weight-only, integer, by groups of consecutive input columns (`W4A16` with groups of 128 is the default).
`ignore` follows compressed-tensors: a module's exact name, or `re:` and a pattern matched from the start of the name.
"""

import math
import re
from collections.abc import Collection
from typing import Literal

from pydantic import Field, field_validator

from pipeline.errors import did_you_mean
from pipeline.headers import ITEM_BYTES
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec, ignored
from pipeline.stage import Stage
from pipeline.target import Memory

SERVED_BITS = (4, 8)  # what vLLM's weight-only kernels (Marlin, Machete) take
ROUNDING_BYTES = 8  # working memory for each weight that a forward rounds, measured
BLOCK_WEIGHTS = 1 << 24  # weights packed or unpacked at once ...
BLOCK_BYTES = 9  # ... and the working memory of each, measured at 4 bits: rounded values, their int8 and int32 copies


class WeightQuantization(Stage.Params):
    num_bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(default=128, ge=1)
    symmetric: bool = True
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("ignore")
    @classmethod
    def _patterns_compile(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        for entry in ignore:
            try:
                re.compile(entry)
            except re.error as error:
                if entry.startswith("re:"):
                    raise ValueError(f"'{entry}' is not a regular expression: {error}") from None
        return ignore

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric)

    def ignored_names(self, model: ModelSpec) -> tuple[str, ...]:
        """`ignore` as it must stand in config.json: with tied embeddings `lm_head` is a Linear layer without a tensor of
        its own, which readers of the format would otherwise expect to find packed."""
        if model.architecture.tied and not ignored("lm_head", self.ignore):
            return (*self.ignore, "lm_head")
        return self.ignore

    def apply(self, model: ModelSpec) -> ModelSpec:
        """The quantized model's spec.

        ValueError: an `ignore` entry matches no Linear layer, nothing is left to quantize, or the group size does not divide.
        """
        layers = [name for group in model.linear_groups for name in group.module_names]
        known = {*layers, "lm_head"}
        for entry in self.ignore:
            if not any(ignored(name, (entry,)) for name in known):
                raise ValueError(f"ignore: '{entry}' matches no Linear layer{did_you_mean(entry, known) if entry[:3] != 're:' else ''}")
        if all(ignored(name, self.ignore) for name in layers):
            raise ValueError("ignore leaves no Linear layer to quantize; remove entries from it")
        return model.with_format(self.format, self.ignore)

    def explain(self) -> list[str]:
        if self.num_bits in SERVED_BITS:
            return []
        return [f"num_bits {self.num_bits}: transformers loads the result, but vLLM's kernels take only 4 and 8 bits"]


class CalibratedQuantization(WeightQuantization):
    """A quantizer that looks at what the layers compute on text."""

    num_samples: int = Field(default=128, ge=1)  # calibration windows ...
    max_length: int = Field(default=256, ge=2)  # ... and their tokens; 2048 is usual for models of a billion weights and more

    def apply(self, model: ModelSpec) -> ModelSpec:
        """ValueError also for windows longer than the model's positions."""
        positions = model.architecture.max_position
        if self.max_length > positions:
            raise ValueError(f"max_length {self.max_length} is more than the model's {positions} positions; write {positions} or less")
        return super().apply(model)

    @property
    def tokens(self) -> int:
        return self.num_samples * self.max_length


class CalibrationExecution(Stage.Execution):
    """Neither setting changes the result.

    `offload` is where the model waits while llm-compressor takes its decoder layers one by one: to the accelerator, where there is
    one, else they are calibrated in RAM. With `disk` a layer is read when its turn comes and what was changed of it is written to a
    temporary folder, so that a 70B model needs the RAM of one layer and not of its 140 GB.
    """

    batch_size: int = Field(default=8, ge=1)  # calibration windows in one forward
    offload: Literal["ram", "disk"] = "ram"


def calibration_memory(
    params: CalibratedQuantization, execution: CalibrationExecution, dense: ModelSpec, packed: ModelSpec, changed: Collection[str]
) -> Memory:
    """What stays in RAM and on disk while one decoder layer after another is calibrated, and while the result is written.

    `changed` are the Linear layers that the calibration changes.
    """
    shape, item = dense.architecture, ITEM_BYTES[dense.dtype]
    embedding = shape.vocab_size * shape.hidden_size * item
    ram = {
        "calibration hidden states": 2 * params.tokens * shape.hidden_size * item,
        "attention masks": params.tokens * params.max_length * item,
    }
    packing = packing_memory(dense, packed, writes=packed)
    if execution.offload == "disk":
        held = {"one layer, or the embedding": max(layer_bytes(dense), embedding)}
        return Memory(ram=held | ram | packing.ram, disk=packing.disk | {"changed weights": offloaded_bytes(packed, changed)})
    held = {"model": dense.nbytes} | ({"untied copy of the embedding": embedding} if shape.tied else {})
    return Memory(ram=held | ram | packing.ram, disk=packing.disk)


def layer_bytes(dense: ModelSpec) -> int:
    """Of the Linear layers of one decoder layer."""
    return sum(math.prod(group.shape) * ITEM_BYTES[dense.dtype] for group in dense.dense().linear_groups if group.layers)


def offloaded_bytes(packed: ModelSpec, changed: Collection[str]) -> int:
    """Of dense weights on their way to be packed, with the scale and int8 zero point of each group."""
    item, total = ITEM_BYTES[packed.dtype], 0
    for group in packed.linear_groups:
        weights = math.prod(group.shape)
        total += weights * item * sum(name in changed for name in group.module_names)
        total += weights // (group.format.group_size or weights) * (item + 1) * group.count * (not group.format.is_dense)
    return total


def probe_memory(model: ModelSpec) -> dict[str, int]:
    """What proving the result takes on the CPU, where it was made on a GPU: the weights are rounded once more there."""
    largest = max(math.prod(group.shape) for group in model.linear_groups if group.layers)
    return {"copies of one weight in the probe": ROUNDING_BYTES * largest}


def batch_memory(params: CalibratedQuantization, model: ModelSpec, batch_size: int) -> int:
    """Bytes of a decoder layer's activations in one forward of `batch_size` windows.

    llm-compressor calibrates with eager attention: every score exists, twice in the model's dtype and once in float32.
    """
    shape, item, length = model.architecture, ITEM_BYTES[model.dtype], params.max_length
    widest = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.num_heads * shape.head_dim
    scores = shape.num_heads * length * (2 * item + 4)
    return batch_size * length * (widest * item + 4 * shape.intermediate_size + scores)


def packing_memory(dense: ModelSpec, packed: ModelSpec, writes: ModelSpec) -> Memory:
    """Peak of a stage that turns one weight after another from dense to packed, or back, and writes `writes`."""
    shapes = [group.shape for group in packed.groups if not group.format.is_dense]
    forms = [group.tensors(packed.dtype).values() for group in packed.groups if not group.format.is_dense]
    largest = max((math.prod(shape) for shape in shapes), default=0)
    ram = {
        "one dense weight": largest * ITEM_BYTES[dense.dtype],
        "its packed form, in blocks and joined": 2 * max((sum(math.prod(s) * ITEM_BYTES[d] for d, s in form) for form in forms), default=0),
        "working copies of a block of rows": min(largest, BLOCK_WEIGHTS) * BLOCK_BYTES,
    }
    return Memory(ram=ram, disk={"checkpoint": writes.nbytes})
