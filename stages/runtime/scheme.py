"""The settings every weight quantizer shares, and what they do to a model's spec. Needs no torch: a plan reads it.

A scheme here is weight-only, integer, by groups of consecutive input columns (`W4A16` with groups of 128 is the default).
`ignore` follows compressed-tensors: a module's exact name, or `re:` and a pattern matched from the start of the name.
"""

import math
import re
from collections.abc import Collection
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import AfterValidator, Field, model_validator

from pipeline.compute_dtype import Computing
from pipeline.errors import did_you_mean
from pipeline.headers import ITEM_BYTES
from pipeline.layout import ModuleGroup, WeightFormat
from pipeline.spec import ModelSpec, ignored
from pipeline.stage import Stage
from pipeline.target import Memory
from stages.runtime.peak_memory import inner_width, kept_by_malloc, layer_bytes, peak, resident_memory, widest

SERVED_BITS = (4, 8)  # what vLLM's weight-only kernels (Marlin, Machete) take
GRID = 100.0  # observer mse shrinks a group's range in steps of one part in so many
ROUNDING_BYTES = 8  # working memory for each weight that a forward rounds, measured
BLOCK_WEIGHTS = 1 << 24  # weights packed or unpacked at once ...
BLOCK_BYTES = 9  # ... and the working memory of each, measured at 4 bits: rounded values, their int8 and int32 copies
FOUR_BIT_BYTES = 14  # of bitsandbytes: values and scaled values in float32, which of the 16 they are, in int32 and int8


def _patterns_compile(ignore: tuple[str, ...]) -> tuple[str, ...]:
    for entry in ignore:
        try:
            re.compile(entry)
        except re.error as error:
            if entry.startswith("re:"):
                raise ValueError(f"'{entry}' is not a regular expression: {error}") from None
    return ignore


Ignore = Annotated[tuple[str, ...], AfterValidator(_patterns_compile)]


class Observer(NamedTuple):
    """How the range of a group of weights is found (stages/runtime/clipping.py)."""

    name: Literal["minmax", "mse"] = "minmax"
    maxshrink: float = 0.2  # llm-compressor's default

    @property
    def steps(self) -> int:
        """Shares of the range that are tried: 20 are 1, 0.99, ... 0.81."""
        return int(self.maxshrink * GRID) if self.name == "mse" else 0


MINMAX = Observer()


class WeightQuantization(Stage.Params):
    num_bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(default=128, ge=1)
    symmetric: bool = True
    ignore: Ignore = ("lm_head",)
    observer: Literal["minmax", "mse"] = "minmax"  # a group's range: of its weights, or as much of that as rounds with the least error
    maxshrink: float = Field(default=0.2, ge=0.01, lt=1)  # mse: by how much of itself a range shrinks at most

    @model_validator(mode="after")
    def _shrinks_where_it_searches(self) -> "WeightQuantization":
        if self.observer == "minmax" and self.maxshrink != Observer().maxshrink:
            raise ValueError("maxshrink: observer minmax shrinks no range; leave it out or write observer: mse")
        return self

    @property
    def ranges(self) -> "Observer":
        return Observer(self.observer, self.maxshrink)

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric)

    def ignored_names(self, model: ModelSpec) -> tuple[str, ...]:
        return names_left_dense(self.ignore, model)

    def apply(self, model: ModelSpec) -> ModelSpec:
        """The quantized model's spec. ValueError as of `pack_layers`."""
        return pack_layers(model, self.format, self.ignore)

    def explain(self) -> list[str]:
        if self.num_bits in SERVED_BITS:
            return []
        return [f"num_bits {self.num_bits}: vLLM's usual kernels take 4 and 8 bits; others need its newest ones, see run mode=check"]


def names_left_dense(ignore: tuple[str, ...], model: ModelSpec) -> tuple[str, ...]:
    """`ignore` as it must stand in config.json: with tied embeddings `lm_head` is a Linear layer without a tensor of its own, which
    readers of the format would otherwise expect to find packed."""
    return (*ignore, "lm_head") if model.architecture.tied and not ignored("lm_head", ignore) else ignore


def pack_layers(model: ModelSpec, form: WeightFormat, ignore: tuple[str, ...]) -> ModelSpec:
    """The spec of `model` with its Linear layers stored as `form`, but for those of `ignore`.

    ValueError: an `ignore` entry matches no Linear layer, nothing is left to quantize, or the group size does not divide. An entry
    may match a router, as llm-compressor's recipes for mixtures of experts do: there it is a Linear layer like any other.
    """
    named = [group for group in model.groups if group.kind in ("linear", "router")]
    for entry in ignore:
        if not ignored("lm_head", (entry,)) and not matches(entry, named):
            layers = {"lm_head", *(name for group in model.linear_groups for name in group.module_names)}
            raise ValueError(f"ignore: '{entry}' matches no Linear layer{did_you_mean(entry, layers) if entry[:3] != 're:' else ''}")
    packed = model.with_format(form, ignore)
    if packed.is_dense:
        raise ValueError("ignore leaves no Linear layer to quantize; remove entries from it")
    return packed


class CalibratedQuantization(Computing, WeightQuantization):
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


class Windows(Protocol):
    """Calibration text: `num_samples` windows of `max_length` tokens."""

    @property
    def num_samples(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class CalibrationWindows(NamedTuple):
    num_samples: int
    max_length: int

    @property
    def tokens(self) -> int:
        return self.num_samples * self.max_length


def matches(entry: str, groups: Collection[ModuleGroup]) -> bool:
    """Whether that entry of `ignore` names one of their modules."""
    pattern = entry.startswith("re:")
    return any(ignored(name, (entry,)) for group in groups if pattern or group.may_hold(entry) for name in group.module_names)


class CalibrationExecution(Stage.Execution):
    """Neither setting changes the result.

    `offload` is where the model waits while llm-compressor takes its decoder layers one by one: to the accelerator, where there is
    one, else they are calibrated in RAM. With `disk` a layer is read when its turn comes and what was changed of it is written to a
    temporary folder, so that a 70B model needs the RAM of one layer and not of its 140 GB.
    """

    batch_size: int = Field(default=8, ge=1)  # calibration windows in one forward
    offload: Literal["ram", "disk"] = "ram"


def calibration_memory(
    params: Windows,
    computing: Computing,
    execution: CalibrationExecution,
    dense: ModelSpec,
    packed: ModelSpec,
    changed: Collection[str],
    working: dict[str, int],
) -> Memory:
    """RAM and disk. RAM in the phase that takes most: decoder layers are calibrated, each of which takes `working` beside what is held
    throughout; or the result is proven and packed; or it is loaded again. `changed` are the Linear layers that the calibration changes.
    """
    shape, item, on_disk = dense.architecture, computing.item, execution.offload == "disk"
    in_memory = computing.in_memory(dense)
    embedding = shape.vocab_size * shape.hidden_size * item
    if on_disk:
        held = {"one layer, or the embedding": max(layer_bytes(in_memory), embedding)}
    else:
        held = {"model": in_memory.nbytes} | ({"untied copy of the embedding": embedding} if shape.tied else {})
    states = {
        "calibration hidden states": 2 * params.tokens * shape.hidden_size * item,
        "attention masks": params.tokens * params.max_length * item,
    }
    packing = packing_memory(dense, packed, writes=packed)
    reloading: dict[str, int] = {}  # with offload to disk it is done layer by layer
    if not on_disk:
        reloading = {"freed weights that malloc keeps": kept_by_malloc(in_memory)}
        reloading |= resident_memory("the result", computing.in_memory(packed), on_gpu=False)[1]
    ram = peak(held | states | working, held | probe_memory(dense), held | packing.ram, reloading)
    return Memory(
        ram=ram, disk=packing.disk | ({"changed weights": offloaded_bytes(computing.in_memory(packed), changed)} if on_disk else {})
    )


def offloaded_bytes(packed: ModelSpec, changed: Collection[str]) -> int:
    """Of dense weights on their way to be packed, with the scale and int8 zero point of each group."""
    item, total = ITEM_BYTES[packed.dtype], 0
    for group in packed.linear_groups:
        weights = math.prod(group.shape)
        total += weights * item * sum(name in changed for name in group.module_names)
        total += weights // (group.format.group_size or weights) * (item + 1) * group.count * (not group.format.is_dense)
    return total


def probe_memory(model: ModelSpec) -> dict[str, int]:
    """What proving the result takes, on the CPU wherever it was made: the weights are rounded once more for that."""
    largest = max(math.prod(group.shape) for group in model.linear_groups if group.layers)
    return {"copies of one weight in the probe": ROUNDING_BYTES * largest}


def batch_memory(params: Windows, model: ModelSpec, batch_size: int) -> int:
    """Bytes of a decoder layer's activations in one forward of `batch_size` windows, the model being as it is in memory.

    llm-compressor calibrates with eager attention: every score exists, twice in the model's dtype and once in float32.
    """
    shape, item, length = model.architecture, ITEM_BYTES[model.dtype], params.max_length
    scores = shape.num_heads * length * (2 * item + 4)
    return min(batch_size, params.num_samples) * length * (widest(shape) * item + 4 * inner_width(shape) + scores)


def unpacking_memory(model: ModelSpec) -> int:
    """Working copies of a block of rows, where there is something to unpack."""
    sizes = [math.prod(group.shape) for group in model.groups if not group.format.is_dense]
    return BLOCK_BYTES * min(max(sizes, default=0), BLOCK_WEIGHTS)


def packing_memory(dense: ModelSpec, packed: ModelSpec, writes: ModelSpec) -> Memory:
    """Peak of a stage that turns one weight after another from dense to packed, or back, and writes `writes`."""
    shapes = [group.shape for group in packed.groups if not group.format.is_dense]
    forms = [group.tensors(packed.dtype).values() for group in packed.groups if not group.format.is_dense]
    largest = max((math.prod(shape) for shape in shapes), default=0)
    four_bit = writes is packed and any(group.format.layout in ("nf4", "fp4") for group in packed.groups)
    ram = {
        "one dense weight": largest * ITEM_BYTES[dense.dtype],
        "its packed form, in blocks and joined": 2 * max((sum(math.prod(s) * ITEM_BYTES[d] for d, s in form) for form in forms), default=0),
        "working copies of a block of rows": FOUR_BIT_BYTES * min(largest, BLOCK_WEIGHTS) if four_bit else unpacking_memory(packed),
    }
    return Memory(ram=ram, disk={"checkpoint": writes.nbytes})
