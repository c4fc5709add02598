"""Weights in compressed-tensors' `pack-quantized` format: a [rows, columns] matrix becomes int32 words and a scale for each group.

The arithmetic is the library's own (`PackedQuantizationCompressor`), so that what is written here is what transformers and
vLLM read. It is applied to blocks of rows, because its int32 working copies need several times the weight's own bytes:
`weight_packed`, `weight_scale` and `weight_zero_point` are all split along rows, the last one 32 rows to `num_bits` words.
"""

from collections.abc import Callable, Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.utils import calculate_qparams

from pipeline.artifact import Checkpoint
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.scheme import BLOCK_WEIGHTS
from stages.runtime.tensors import CheckpointWriter, TensorReader, copy_companions

LAYOUT = "pack-quantized"


def scheme_of(form: WeightFormat, actorder: str | None = None) -> QuantizationScheme:
    """The library's description of one packed format. `actorder` only records how GPTQ went about it."""
    weights = QuantizationArgs(
        num_bits=form.num_bits,
        type="int",
        strategy="group",
        group_size=form.group_size,
        symmetric=form.symmetric,
        actorder=actorder,
        observer="memoryless_minmax",
        observer_kwargs={},
        zp_dtype=None if form.symmetric else "torch.int8",
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, format=LAYOUT)


def quantization_config(form: WeightFormat, ignore: tuple[str, ...], actorder: str | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json, field for field what llm-compressor saves."""
    config = QuantizationConfig(
        config_groups={"group_0": scheme_of(form, actorder)},
        format=LAYOUT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    content: dict[str, Any] = config.model_dump(mode="json")
    return content | {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices over rows of about BLOCK_WEIGHTS weights, each but the last a multiple of 32 rows."""
    height = max(32, BLOCK_WEIGHTS // columns // 32 * 32)
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]


def min_max_parameters(weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group, [rows, groups], from its smallest and largest weight, in the weight's dtype."""
    groups = weight.reshape(len(weight), -1, form.group_size or weight.shape[1])
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme_of(form).weights)
    return scale, zero_point


def pack_weight(weight: torch.Tensor, form: WeightFormat, scale: torch.Tensor, zero_point: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a [rows, columns] weight rounded with its groups' scales and zero points, both [rows, groups].

    A symmetric format needs no zero point and stores none.
    """
    scheme, parts = scheme_of(form), []
    source = {"weight": weight, "weight_scale": scale} | ({} if zero_point is None else {"weight_zero_point": zero_point})
    for rows in row_blocks(*weight.shape):
        state = {suffix: tensor.detach()[rows].cpu() for suffix, tensor in source.items()}
        parts.append(PackedQuantizationCompressor.compress(state, scheme))
    packed = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0] if suffix != "weight_shape"}
    return packed | {"weight_shape": torch.tensor(weight.shape)}


def calibrated_packer(model: torch.nn.Module, form: WeightFormat) -> Callable[[str], dict[str, torch.Tensor]]:
    """Packs, by name, the modules of a model whose weights, scales and zero points llm-compressor has settled in place."""

    def pack(name: str) -> dict[str, torch.Tensor]:
        module = model.get_submodule(name)
        weight, scale, zero_point = (getattr(module, part, None) for part in ("weight", "weight_scale", "weight_zero_point"))
        if weight is None or scale is None:
            raise ValueError(f"{name} was not calibrated; name it in ignore or report this")
        return pack_weight(weight, form, scale, zero_point)

    return pack


def unpack_weight(packed: Mapping[str, torch.Tensor], form: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The [rows, columns] weight in `dtype` from its tensors by suffix, bit for bit as transformers sees it.

    transformers casts scales to the model's dtype when it loads them, so the product is taken in that dtype.
    """
    rows, columns = (int(size) for size in packed["weight_shape"])
    scheme, weight = scheme_of(form), torch.empty(rows, columns, dtype=dtype)
    for block in row_blocks(rows, columns):
        shape = torch.tensor([block.stop - block.start, columns])
        state = {
            "weight_packed": packed["weight_packed"][block],
            "weight_scale": packed["weight_scale"][block].to(dtype),
            "weight_shape": shape,
        }
        if not form.symmetric:
            words = slice(block.start * form.num_bits // 32, -(-block.stop * form.num_bits // 32))
            state["weight_zero_point"] = packed["weight_zero_point"][words]
        weight[block] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return weight


def packed_formats(spec: ModelSpec) -> dict[str, WeightFormat]:
    """Module name -> format of every packed module."""
    return {name: group.format for group in spec.groups if not group.format.is_dense for name in group.module_names}


def write_quantized(
    ctx: Context,
    model: Checkpoint,
    spec: ModelSpec,
    quantization: dict[str, Any],
    pack: Callable[[str], dict[str, torch.Tensor]],
    dense: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write `model` to `ctx.output` as `spec` says: packed modules as `pack(module)` gives them, every other tensor as
    `dense(name)` gives it or, without that, copied unchanged.

    config.json is the source's own with `quantization` added, not what a library would save again.
    """
    reader, formats, known = TensorReader(model.path), packed_formats(spec), model.model_spec.tensors()
    names = [name for name in reader.table if name in known]  # leaves out rotary buffers and a tied copy of the embedding
    with CheckpointWriter(ctx.output) as writer:
        for done, name in enumerate(names, 1):
            module = name.removesuffix(".weight")
            if module in formats:
                for suffix, tensor in pack(module).items():
                    writer.add(f"{module}.{suffix}", tensor)
            elif dense is not None:
                writer.add(name, dense(name))
            else:
                writer.copy(name, reader)
            ctx.progress("writing", done, len(names))
    copy_companions(model.path, ctx.output, model.config | {"quantization_config": quantization})
