"""The tensors that bitsandbytes 0.50 stores for one [rows, columns] weight, to the byte.

    nf4, fp4    two weights to a byte in `weight` [ceil(n / 2), 1]; for each 64 weights, counted row after row, their largest magnitude in
                `absmax`: float32 or, doubly quantized, a byte that `nested_quant_map` [256] looks up, times a float32 of
                `nested_absmax` for each 256 of them, plus one offset; `quant_map`: the 16 values; what is no tensor, as JSON in bytes
    llm_int8    bytes in `weight`, each row's largest magnitude in `SCB` (value = byte * SCB / 127), `weight_format` 0: row by row

A 256 x 512 bf16 matrix in doubly quantized nf4 is 65,536 B of weights, 2,048 B of absmax, 32 B of nested_absmax, 1,088 B of maps and
168 B of JSON. How long the JSON is depends on how many digits the offset has, so it is padded with spaces, which JSON allows.
"""

import json
import math
from typing import Any

BLOCK, NESTED_BLOCK = 64, 256  # weights to an absmax, absmax to a nested one: what transformers asks for and bitsandbytes' kernels take
OFFSET_CHARS = 24  # the longest decimal form of a double
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def llm_int8_tensors(shape: tuple[int, int]) -> Tensors:
    return {"weight": ("I8", shape), "SCB": ("F32", shape[:1]), "weight_format": ("U8", ())}


def four_bit_tensors(kind: str, double_quant: bool, shape: tuple[int, int], dtype: str) -> Tensors:
    """Suffix -> (dtype, shape). `kind` is nf4 or fp4, `dtype` that of the dense weight."""
    weights = math.prod(shape)
    blocks = math.ceil(weights / BLOCK)
    table: Tensors = {
        "weight": ("U8", (math.ceil(weights / 2), 1)),
        "weight.absmax": ("U8" if double_quant else "F32", (blocks,)),
        "weight.quant_map": ("F32", (16,)),
        f"weight.{state_name(kind)}": ("U8", (len(state_json(kind, double_quant, shape, dtype)),)),
    }
    if double_quant:
        nested = {"weight.nested_absmax": ("F32", (math.ceil(blocks / NESTED_BLOCK),)), "weight.nested_quant_map": ("F32", (256,))}
        table |= nested
    return table


def state_name(kind: str) -> str:
    return f"quant_state.bitsandbytes__{kind}"


def state_json(kind: str, double_quant: bool, shape: tuple[int, int], dtype: str, offset: float = 0.0) -> bytes:
    """What bitsandbytes keeps beside the tensors, of one length whatever `offset`, the mean of all absmax, is."""
    state: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "dtype": DTYPE_NAMES[dtype], "shape": shape}
    if not double_quant:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).ljust(len(json.dumps(state | {"nested_offset": 0})) - 1 + OFFSET_CHARS).encode()
