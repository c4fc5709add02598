"""Checkpoints of other libraries to compressed-tensors' `pack-quantized`: the same integers, scales and zero points in another layout.

    gptq   qweight [in * b / 32, out] int32, qzeros [groups, out * b / 32], scales [groups, out], g_idx [in]    (AutoGPTQ, GPTQModel)
    awq    qweight [in, out / 8] int32, qzeros [groups, out / 8], scales [groups, out]                          (AutoAWQ, version GEMM)
    here   weight_packed [out, in * b / 32], weight_zero_point [out * b / 32, groups], weight_scale [out, groups]

In GPTQ's first format (`checkpoint_format` absent or `gptq`) a zero point is stored less one, so that one of 0 borrows from its
neighbours in the word; such a file is refused, because what stood beside it is lost. Scales become the model's dtype, which is what
transformers computes with whatever is stored.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from pipeline.headers import read_json
from pipeline.layout import WeightFormat
from stages.functional.int32_words import in_awq_order, unpack_columns, unpack_rows
from stages.runtime.tensors import TensorReader

Layout = Literal["gptq", "awq"]
Module = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # integers [out, in], zero points and scales [out, groups]


def repacker(folder: Path, form: WeightFormat, dtype: torch.dtype) -> Callable[[str], dict[str, torch.Tensor]]:
    """Gives, by module name, the tensors by suffix of what a library saved in `folder`.

    ValueError where the files hold another format than `form`, or what it cannot express: groups of reordered columns.
    """
    saved = read_json(folder / "config.json").get("quantization_config") or {}
    layout = _check(saved, form)
    reader, stored_less_one = TensorReader(folder), saved.get("checkpoint_format", "gptq") == "gptq"

    def repack(name: str) -> dict[str, torch.Tensor]:
        parts = {
            part: reader.read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{part}" in reader.table
        }
        integers, zeros, scales = read_awq(parts) if layout == "awq" else read_gptq(name, parts, form, stored_less_one)
        return _packed(name, integers, zeros, scales.to(dtype), form)

    return repack


def _check(saved: Mapping[str, Any], form: WeightFormat) -> Layout:
    method = saved.get("quant_method")
    if method not in ("gptq", "awq"):
        raise ValueError(f"the backend saved a checkpoint of method {method}; gptq and awq are read")
    if method == "awq" and saved.get("version", "gemm").lower() != "gemm":
        raise ValueError(f"the backend saved an AWQ checkpoint of version {saved['version']}; gemm is read")
    found = (saved.get("bits"), saved.get("group_size"))
    if found != (form.num_bits, form.group_size):
        raise ValueError(f"the backend saved {found[0]} bits in groups of {found[1]}, not {form.num_bits} in groups of {form.group_size}")
    layout: Layout = method
    return layout


def read_awq(parts: Mapping[str, torch.Tensor]) -> Module:
    integers, zeros = (in_awq_order(unpack_columns(parts[part], 4)) for part in ("qweight", "qzeros"))
    return integers.T, zeros.T, parts["scales"].T


def read_gptq(name: str, parts: Mapping[str, torch.Tensor], form: WeightFormat, stored_less_one: bool) -> Module:
    assert form.num_bits and form.group_size
    integers, zeros = unpack_rows(parts["qweight"], form.num_bits), unpack_columns(parts["qzeros"], form.num_bits)
    groups = torch.arange(len(integers), dtype=torch.int32) // form.group_size
    if "g_idx" in parts and not torch.equal(parts["g_idx"], groups):
        raise ValueError(f"{name}: its columns were reordered across groups, which pack-quantized checkpoints do not record")
    if stored_less_one:
        if (zeros == 2 ** (form.num_bits - 1) - 1).any():  # 0 less one, all bits set
            raise ValueError(
                f"{name} has a zero point of 0, which the first GPTQ format stores as -1 over its neighbours; write symmetric: true, or "
                "another backend"
            )
        zeros = zeros + 1
    return integers.T, zeros.T, parts["scales"].T


def _packed(name: str, integers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, form: WeightFormat) -> dict[str, torch.Tensor]:
    assert form.num_bits
    packed = {
        "weight_packed": pack_to_int32(integers.contiguous(), form.num_bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(integers.shape),
    }
    if not form.symmetric:
        return packed | {"weight_zero_point": pack_to_int32(zeros.contiguous(), form.num_bits, packed_dim=0).contiguous()}
    if zeros.any():
        raise ValueError(f"{name} has zero points beside the middle of its range, although it was quantized symmetrically")
    return packed
