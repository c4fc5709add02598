"""Weights as bitsandbytes stores them, made and read one at a time. What stands where: pipeline/bitsandbytes_layout.py.

The arithmetic is the library's own, operation by operation what its Linear layers do when transformers quantizes or loads a model, but
for blocks of rows: its working copies need some twenty times the bytes of a packed weight. Only the JSON beside a weight is written here.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.autograd._functions import MatmulLtState, matmul
from bitsandbytes.nn.modules import Linear4bit
from transformers import BitsAndBytesConfig

from pipeline.bitsandbytes_layout import BLOCK, NESTED_BLOCK, state_json, state_name
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from stages.runtime.packing import row_blocks
from stages.runtime.scheme import BLOCK_WEIGHTS
from stages.runtime.tensors import DTYPE_NAMES, DTYPES

# It says of every product that bf16 inputs become fp16 on their way to int8, which is what LLM.int8() does.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def pack(weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a [rows, columns] weight."""
    return _pack_int8(weight) if form.layout == "llm_int8" else _pack_four_bit(weight, form)


def unpack(packed: Mapping[str, torch.Tensor], form: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The [rows, columns] weight in `dtype` from its tensors by suffix, bit for bit as transformers dequantizes it.

    A 4-bit weight is dequantized to the dtype that stands beside it, and then is of `dtype`.
    ValueError where what is stored beside the tensors describes another format than `form`.
    """
    if form.layout != "llm_int8":
        return _unpack_four_bit(packed, form, dtype)
    integers, weight = packed["weight"], torch.empty(packed["weight"].shape, dtype=dtype)
    for rows in row_blocks(*integers.shape):
        weight[rows] = functional.int8_vectorwise_dequant(integers[rows], packed["SCB"][rows])
    return weight


def _pack_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = [functional.int8_vectorwise_quant(weight[rows].to(torch.float16))[:2] for rows in row_blocks(*weight.shape)]
    integers, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return {"weight": integers, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _pack_four_bit(weight: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
    parts = [
        functional.quantize_4bit(part, blocksize=BLOCK, quant_type=form.layout) for part in torch.split(weight.flatten(), BLOCK_WEIGHTS)
    ]
    absmax, offset = torch.cat([state.absmax for _, state in parts]), 0.0
    packed = {"weight": torch.cat([nibbles for nibbles, _ in parts]), "weight.quant_map": parts[0][1].code}
    if form.double_quant:
        mean = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
        packed |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.code}
        offset = mean.item()
    shape, dtype = (weight.shape[0], weight.shape[1]), DTYPE_NAMES[weight.dtype]
    state = state_json(form.layout, form.double_quant, shape, dtype, offset)
    return packed | {"weight.absmax": absmax, f"weight.{state_name(form.layout)}": torch.tensor(list(state), dtype=torch.uint8)}


def _unpack_four_bit(packed: Mapping[str, torch.Tensor], form: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    state = read_state(packed[f"weight.{state_name(form.layout)}"])
    stored = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize"))
    if stored != (form.layout, BLOCK, NESTED_BLOCK if form.double_quant else None):
        raise ValueError(f"a weight is stored as {stored}, which its config.json does not say; quantize the model again")
    absmax = packed["weight.absmax"]
    if form.double_quant:
        nested = (packed["weight.nested_absmax"], packed["weight.nested_quant_map"])
        absmax = functional.dequantize_blockwise(absmax, absmax=nested[0], code=nested[1], blocksize=NESTED_BLOCK)
        absmax = absmax + torch.tensor(float(state["nested_offset"]))
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed["weight"], absmax.float(), BLOCK, form.layout, state["shape"], getattr(torch, state["dtype"])
    )
    return weight.to(dtype)


def read_state(tensor: torch.Tensor) -> dict[str, Any]:
    """The JSON beside a 4-bit weight. ValueError where it is none."""
    content = json.loads(bytes(tensor.tolist()))
    if not isinstance(content, dict):
        raise ValueError("what stands beside a 4-bit weight is no JSON object; quantize the model again")
    return content


def config_of(form: WeightFormat, spec: ModelSpec) -> dict[str, Any]:
    """The `quantization_config` of config.json, as transformers saves it. The layers left dense are named one by one: transformers takes
    each entry of that list for a pattern, and other readers for a part of a name, which a full name is for both."""
    dense = [name for group in spec.linear_groups if group.format.is_dense for name in group.module_names]
    skipped = sorted({*dense, "lm_head"} if spec.architecture.tied else dense)
    if form.layout == "llm_int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=form.threshold, llm_int8_skip_modules=skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.layout,
            bnb_4bit_use_double_quant=form.double_quant,
            bnb_4bit_compute_dtype=DTYPES[spec.dtype],
            llm_int8_skip_modules=skipped,
        )
    content: dict[str, Any] = config.to_dict()
    return content


def set_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """Of 4-bit layers, which compute in the dtype that config.json names unless told otherwise."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def without_failing_kernel(model: Any) -> Any:
    """`model`, its 4-bit layers kept from the kernel for CPUs with AVX512-BF16 where it fails: where their rows are no whole blocks."""
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.in_features % BLOCK:
            module.support_avx512bf16_for_cpu = False
    return model


class LLMInt8Linear(torch.nn.Module):
    """A Linear layer that computes as bitsandbytes' `Linear8bitLt` does, from the tensors as they stand in the file.

    Inputs [..., columns] are rounded to int8 by token, but for the columns in which one reaches `threshold`: these stay in fp16 or bf16
    (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339). `Linear8bitLt` keeps its weight where moving it to `meta` does not reach.
    """

    SCB: torch.Tensor

    def __init__(self, rows: int, columns: int, bias: bool, threshold: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.register_buffer("SCB", torch.empty(rows))
        self.bias = torch.nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self.threshold = threshold

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = MatmulLtState()
        state.CB, state.SCB = self.weight, self.SCB
        state.has_fp16_weights, state.is_training, state.threshold = False, False, self.threshold
        outputs: torch.Tensor = matmul(inputs, self.weight, bias=self.bias, state=state)
        return outputs
