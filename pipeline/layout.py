"""How tensors are laid out: a weight format, a group of like modules, a KV cache. The small values that specs are made of.

Formats: bf16, fp16 and fp32 as in safetensors; `pack-quantized` (dense packing: 32 values of b bits fill b int32 words), `int-quantized`
and `float-quantized` as in compressed-tensors 0.19; those of bitsandbytes (pipeline/bitsandbytes_layout.py); llama.cpp's blocks as in a
GGUF file (pipeline/ggml.py).
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.bitsandbytes_layout import four_bit_tensors, llm_int8_tensors
from pipeline.ggml import row_bytes

DType = Literal["BF16", "F16", "F32"]
CacheMode = Literal["per_token_head", "static"]
BlockCache = Literal["q8_0"]  # llama.cpp's INT8: a scale for each 32 values
Layout = Literal["pack-quantized", "int-quantized", "float-quantized", "llm_int8", "nf4", "fp4"]
LAYOUT_BITS: dict[Layout, int] = {"int-quantized": 8, "float-quantized": 8, "llm_int8": 8, "nf4": 4, "fp4": 4}  # the others pack any number
ROUNDS_INPUTS = ("int-quantized", "float-quantized", "llm_int8")
BITSANDBYTES = ("llm_int8", "nf4", "fp4")


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class WeightFormat(Frozen):
    """How the weight matrices of a module group are stored. `num_bits` None means dense, in the model's dtype, unless `ggml` names one
    of llama.cpp's tensor types, as everything in a GGUF file has.

    Of compressed-tensors: integers by groups of `group_size` columns, or by rows where that is None (`pack-quantized`); 8-bit integers
    (`int-quantized`) or e4m3 floats (`float-quantized`) by rows, whose products take inputs rounded likewise, token by token. Of
    bitsandbytes: `nf4` and `fp4`, whose scales `double_quant` rounds too, and `llm_int8`, whose products round their inputs but those
    columns where one reaches `threshold` (0: no column is left out).
    """

    num_bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    ggml: str | None = None
    layout: Layout = "pack-quantized"
    double_quant: bool = False
    threshold: float | None = None

    @classmethod
    def of(cls, layout: Layout, *, double_quant: bool = False, threshold: float | None = None) -> "WeightFormat":
        """A layout that leaves nothing else to choose."""
        return cls(num_bits=LAYOUT_BITS[layout], layout=layout, double_quant=double_quant, threshold=threshold)

    @property
    def is_dense(self) -> bool:
        return self.num_bits is None and self.ggml is None

    @property
    def rounds_inputs(self) -> bool:
        """Whether what the weights are multiplied with is rounded too: the dense weights alone then compute something else."""
        return self.layout in ROUNDS_INPUTS

    @property
    def by_bitsandbytes(self) -> bool:
        return self.layout in BITSANDBYTES

    @property
    def stored(self) -> str:
        """The suffix of the tensor that holds the weights."""
        return "weight_packed" if self.num_bits is not None and self.layout == "pack-quantized" else "weight"

    @property
    def label(self) -> str:
        """`4-bit`, `nf4`: for people."""
        return f"{self.num_bits}-bit" if self.layout == "pack-quantized" else self.layout

    def tensors(self, shape: tuple[int, int], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of what stands on disk for one [out, in] weight."""
        if self.ggml is not None:
            return {"weight": (self.ggml, shape)}
        if self.num_bits is None:
            return {"weight": (dtype, shape)}
        rows, columns = shape
        if self.layout == "llm_int8":
            return llm_int8_tensors(shape)
        if self.layout in ("nf4", "fp4"):
            return four_bit_tensors(self.layout, self.double_quant, shape, dtype)
        if self.layout != "pack-quantized":
            stored = "I8" if self.layout == "int-quantized" else "F8_E4M3"
            return {"weight": (stored, shape), "weight_scale": (dtype, (rows, 1))}
        groups = columns // (self.group_size or columns)
        table: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (rows, math.ceil(columns * self.num_bits / 32))),
            "weight_scale": (dtype, (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not self.symmetric:
            table["weight_zero_point"] = ("I32", (math.ceil(rows * self.num_bits / 32), groups))
        return table


class Sparsity(Frozen):
    """Zeros that every Linear weight of the decoder layers is known to hold; the file has them as it has any other number.

    `share` of the weights, rounded down in each row. Pattern `2:4`: at least two of any four consecutive columns, counted from the first.
    """

    share: float
    pattern: Literal["unstructured", "2:4"] = "unstructured"

    def zeros(self, shape: tuple[int, ...]) -> int:
        """In a [rows, columns] weight, at least."""
        return shape[0] * math.floor(self.share * shape[1] + 1e-6)  # 0.29 * 100 is a little less than 29


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
        """Suffix -> (dtype, shape) of one module of the group. In a GGUF file vectors are F32."""
        table: dict[str, tuple[str, tuple[int, ...]]]
        dtype = dtype if self.format.ggml is None else "F32"
        table = {"weight": (dtype, self.shape)} if len(self.shape) == 1 else self.format.tensors((self.shape[0], self.shape[1]), dtype)
        return table | ({"bias": (dtype, self.shape[:1])} if self.bias else {})


class KVCacheSpec(Frozen):
    """The key and value cache of one sequence: per token and layer, two vectors per KV head.

    `mode` None is a 16-bit cache. Otherwise it is INT8: with a scale for each vector (`per_token_head`), or with a scale for each
    layer and head that calibration found (`static`), which holds only for the weights it was found with; in llama.cpp with a 16-bit
    scale for each 32 values (`q8_0`, 8.5 bits a value).
    """

    layers: int
    kv_heads: int
    head_dim: int
    mode: CacheMode | BlockCache | None = None

    @property
    def num_bits(self) -> int:
        return 8 if self.mode else 16

    @property
    def scale_bytes(self) -> int:
        """Per token, layer and head, for each of key and value: one fp32, or none where scales are fixed."""
        return 4 if self.mode == "per_token_head" else 0

    @property
    def bytes_per_token(self) -> int:
        if self.mode == "q8_0":
            return 2 * self.layers * self.kv_heads * row_bytes("Q8_0", self.head_dim)
        return 2 * self.layers * self.kv_heads * (self.head_dim * self.num_bits // 8 + self.scale_bytes)
