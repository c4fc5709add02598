"""How tensors are laid out: a weight format, a group of like modules, a KV cache. The small values that specs are made of.

Formats: bf16, fp16 and fp32 as in safetensors; `pack-quantized` as in compressed-tensors 0.19 (dense packing: 32 values of b bits
fill b int32 words).
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

DType = Literal["BF16", "F16", "F32"]
CacheMode = Literal["per_token_head", "static"]


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WeightFormat(Frozen):
    """How the weight matrices of a module group are stored. `num_bits` None means dense, in the model's dtype."""

    num_bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True

    @property
    def is_dense(self) -> bool:
        return self.num_bits is None

    def tensors(self, shape: tuple[int, int], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of what stands on disk for one [out, in] weight."""
        if self.num_bits is None:
            return {"weight": (dtype, shape)}
        rows, columns = shape
        assert self.group_size, "a packed format has a group size"
        groups = columns // self.group_size
        table: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (rows, math.ceil(columns * self.num_bits / 32))),
            "weight_scale": (dtype, (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not self.symmetric:
            table["weight_zero_point"] = ("I32", (math.ceil(rows * self.num_bits / 32), groups))
        return table


class ModuleGroup(Frozen):
    """Modules alike in everything but their layer and expert, one for each pair.

    `name` holds `{layer}` where `layers` is not empty, and `{expert}` where `experts` is not. A router is a matrix too, but no Linear
    layer: it picks each token's experts, and every quantizer leaves it dense.
    """

    name: str
    kind: Literal["embedding", "linear", "router", "norm"]
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    bias: bool = False
    format: WeightFormat = WeightFormat()

    @property
    def pattern(self) -> str:
        """`name` with a `*` for each number, to speak of all modules at once."""
        return self.name.format(layer="*", expert="*")

    @property
    def module_names(self) -> list[str]:
        return [self.name.format(layer=layer, expert=expert) for layer in self.layers or (0,) for expert in self.experts or (0,)]

    def may_hold(self, name: str) -> bool:
        """Whether a module of that name could be among them, told without building the names: of experts there are thousands."""
        return name.startswith(self.name.partition("{")[0]) and name.endswith(self.name.rpartition("}")[2])

    @property
    def count(self) -> int:
        return max(1, len(self.layers)) * max(1, len(self.experts))

    @property
    def num_parameters(self) -> int:
        """Of all modules together, however they are stored."""
        return self.count * (math.prod(self.shape) + self.bias * self.shape[0])

    def split(self, chosen: Callable[[str], bool]) -> tuple[list["ModuleGroup"], list["ModuleGroup"]]:
        """The modules whose names are `chosen`, and the others, in as few groups as hold them."""
        rows: dict[tuple[bool, ...], list[int]] = {}  # which experts are chosen -> in which layers
        for layer in self.layers or (0,):
            flags = tuple(chosen(self.name.format(layer=layer, expert=expert)) for expert in self.experts or (0,))
            rows.setdefault(flags, []).append(layer)
        parts: dict[bool, list[ModuleGroup]] = {True: [], False: []}
        for flags, layers in rows.items():
            for wanted in set(flags):
                experts = tuple(expert for expert, flag in zip(self.experts, flags, strict=False) if flag is wanted)
                parts[wanted].append(self.model_copy(update={"layers": tuple(layers) if self.layers else (), "experts": experts}))
        return parts[True], parts[False]

    def tensors(self, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of one module of the group."""
        table: dict[str, tuple[str, tuple[int, ...]]]
        table = {"weight": (dtype, self.shape)} if len(self.shape) == 1 else self.format.tensors((self.shape[0], self.shape[1]), dtype)
        return table | ({"bias": (dtype, self.shape[:1])} if self.bias else {})


class KVCacheSpec(Frozen):
    """The key and value cache of one sequence: per token and layer, two vectors per KV head.

    `mode` None is a 16-bit cache. Otherwise it is INT8: with a scale for each vector (`per_token_head`), or with a scale for each
    layer and head that calibration found (`static`), which holds only for the weights it was found with.
    """

    layers: int
    kv_heads: int
    head_dim: int
    mode: CacheMode | None = None

    @property
    def num_bits(self) -> int:
        return 8 if self.mode else 16

    @property
    def scale_bytes(self) -> int:
        """Per token, layer and head, for each of key and value: one fp32, or none where scales are fixed."""
        return 4 if self.mode == "per_token_head" else 0

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * (self.head_dim * self.num_bits // 8 + self.scale_bytes)
