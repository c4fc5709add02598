"""How tensors are laid out: a weight format, a group of like modules, a KV cache. The small values that specs are made of.

Formats: bf16, fp16 and fp32 as in safetensors; `pack-quantized` as in compressed-tensors 0.19 (dense packing: 32 values of b bits
fill b int32 words).
"""

import math
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
    """Modules alike in everything but their layer. `name` holds `{layer}` where `layers` is not empty."""

    name: str
    kind: Literal["embedding", "linear", "norm"]
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()
    bias: bool = False
    format: WeightFormat = WeightFormat()

    @property
    def module_names(self) -> list[str]:
        return [self.name.format(layer=layer) for layer in self.layers] or [self.name]

    @property
    def count(self) -> int:
        return max(1, len(self.layers))

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
