"""Weights as compressed-tensors stores them: a [rows, columns] matrix becomes int32 words and a scale for each group (`pack-quantized`),
or 8-bit integers or floats and a scale for each row (`int-quantized`, `float-quantized`).

The arithmetic is the library's own, so that what is written here is what transformers and vLLM read. It is applied to blocks of rows,
because its int32 working copies need several times the weight's own bytes: `weight_packed`, `weight_scale` and `weight_zero_point` are
all split along rows, the last one 32 rows to `num_bits` words.
"""

from collections.abc import Callable, Mapping
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.utils import calculate_qparams

from pipeline.artifact import Checkpoint, QuantizedCheckpoint
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.scheme import BLOCK_WEIGHTS, MINMAX, Observer
from stages.runtime.tensors import CheckpointWriter, TensorReader, copy_companions

OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse"}  # the library's names of how a group's range is found


def scheme_of(
    form: WeightFormat, actorder: str | None = None, observer: Observer = MINMAX, scale_dtype: torch.dtype | None = None
) -> QuantizationScheme:
    """The library's description of one format. `actorder` only records how GPTQ went about it; `observer` says how ranges were found.

    `scale_dtype`: what scales are rounded to as soon as they are found, for a model that computes in another dtype than it is stored in.
    """
    kind = "float" if form.layout == "float-quantized" else "int"
    weights = QuantizationArgs(
        num_bits=form.num_bits,
        type=kind,
        strategy="group" if form.group_size else "channel",
        group_size=form.group_size,
        symmetric=form.symmetric,
        actorder=actorder,
        observer=OBSERVERS[observer.name],
        observer_kwargs={} if observer.maxshrink == MINMAX.maxshrink else {"maxshrink": observer.maxshrink},
        zp_dtype=None if form.symmetric else "torch.int8",
        scale_dtype=scale_dtype,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=rounded_inputs(form), format=form.layout)


def rounded_inputs(form: WeightFormat) -> QuantizationArgs | None:
    """How the inputs of a layer are rounded while it computes: as its weights are, with a scale for each token. None: they are not."""
    if form.layout not in ("int-quantized", "float-quantized"):
        return None
    kind = "float" if form.layout == "float-quantized" else "int"
    return QuantizationArgs(num_bits=8, type=kind, strategy="token", symmetric=True, dynamic=True, observer_kwargs={})


def quantization_config(
    form: WeightFormat, ignore: tuple[str, ...], actorder: str | None = None, observer: Observer = MINMAX
) -> dict[str, Any]:
    """The `quantization_config` of config.json, field for field what llm-compressor saves."""
    config = QuantizationConfig(
        config_groups={"group_0": scheme_of(form, actorder, observer)},
        format=form.layout,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    content: dict[str, Any] = config.model_dump(mode="json")
    return content | {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}


def config_of(spec: ModelSpec, ignore: tuple[str, ...], actorder: str | None = None, observer: Observer = MINMAX) -> dict[str, Any]:
    """`quantization_config` of a model whose layers may differ in their bits."""
    schemes = schemes_of(spec, actorder, observer)
    form = next(iter(packed_formats(spec).values()))
    groups = {name: scheme.model_dump(mode="json") for name, scheme in schemes.items()}
    return quantization_config(form, ignore, actorder, observer) | {"config_groups": groups}


def schemes_of(
    spec: ModelSpec, actorder: str | None = None, observer: Observer = MINMAX, scale_dtype: torch.dtype | None = None
) -> dict[str, QuantizationScheme]:
    """The library's `config_groups`: one for all Linear layers, or where formats differ one for each, with the names of its layers."""
    layers: dict[WeightFormat, list[str]] = {}
    for module, form in packed_formats(spec).items():
        layers.setdefault(form, []).append(module)
    if len(layers) == 1:
        return {"group_0": scheme_of(next(iter(layers)), actorder, observer, scale_dtype)}
    schemes = ((scheme_of(form, actorder, observer, scale_dtype), names) for form, names in layers.items())
    return {f"group_{n}": scheme.model_copy(update={"targets": names}) for n, (scheme, names) in enumerate(schemes)}


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
    scheme, compressor, parts = scheme_of(form), BaseCompressor.get_value_from_registry(form.layout), []
    source = {"weight": weight, "weight_scale": scale} | ({} if zero_point is None else {"weight_zero_point": zero_point})
    for rows in row_blocks(*weight.shape):
        state = {suffix: tensor.detach()[rows].cpu() for suffix, tensor in source.items()}
        parts.append(compressor.compress(state, scheme))
    packed = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0] if suffix != "weight_shape"}
    return packed | ({"weight_shape": torch.tensor(weight.shape)} if "weight_shape" in parts[0] else {})


def calibrated_packer(
    model: torch.nn.Module, formats: Mapping[str, WeightFormat], stored: torch.dtype
) -> Callable[[str], dict[str, torch.Tensor]]:
    """Packs, by name, the modules of a model whose weights, scales and zero points llm-compressor has settled in place. Scales get the
    dtype `stored`, whose values they have already."""

    def pack(name: str) -> dict[str, torch.Tensor]:
        module = model.get_submodule(name)
        weight, scale, zero_point = (getattr(module, part, None) for part in ("weight", "weight_scale", "weight_zero_point"))
        if weight is None or scale is None:
            raise ValueError(f"{name} was not calibrated; name it in ignore or report this")
        packed = pack_weight(weight, formats[name], scale, zero_point)
        return packed | {"weight_scale": packed["weight_scale"].to(stored)}

    return pack


def unpack_weight(packed: Mapping[str, torch.Tensor], form: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The [rows, columns] weight in `dtype` from its tensors by suffix, bit for bit as transformers sees it.

    transformers casts scales to the model's dtype when it loads them, so the product is taken in that dtype.
    """
    if form.by_bitsandbytes:
        from stages.runtime.bitsandbytes_weights import unpack  # here: importing the library initialises CUDA

        return unpack(packed, form, dtype)
    rows, columns = (int(size) for size in packed.get("weight_shape", packed[form.stored].shape))
    scheme, compressor = scheme_of(form), BaseCompressor.get_value_from_registry(form.layout)
    weight = torch.empty(rows, columns, dtype=dtype)
    for block in row_blocks(rows, columns):
        state = {form.stored: packed[form.stored][block], "weight_scale": packed["weight_scale"][block].to(dtype)}
        if "weight_shape" in packed:
            state["weight_shape"] = torch.tensor([block.stop - block.start, columns])
        if not form.symmetric:
            words = slice(block.start * form.num_bits // 32, -(-block.stop * form.num_bits // 32))
            state["weight_zero_point"] = packed["weight_zero_point"][words]
        weight[block] = compressor.decompress(state, scheme)["weight"]
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
    tensors, stored = spec.tensors(), {name: [name] for name in names}  # what stands in the file for each
    for module, form in formats.items():
        stored[f"{module}.weight"] = [f"{module}.{suffix}" for suffix in form.tensors((1, 1), spec.dtype)]
    with CheckpointWriter(ctx.output, {part: tensors[part] for name in names for part in stored[name]}) as writer:
        for done, name in enumerate(names, 1):
            module = name.removesuffix(".weight")
            if module in formats:
                packed = {f"{module}.{suffix}": tensor for suffix, tensor in pack(module).items()}
                for part in dict.fromkeys((*stored[name], *packed)):
                    writer.add(part, packed[part])
            elif dense is not None:
                writer.add(name, dense(name))
            else:
                writer.copy(name, reader)
            ctx.progress("writing", done, len(names))
    copy_companions(model.path, ctx.output, model.config | {"quantization_config": quantization})


def rounded_to_nearest(ctx: Context, model: Checkpoint, spec: ModelSpec, ignore: tuple[str, ...]) -> QuantizedCheckpoint:
    """Write `model` as `spec` says, in one of compressed-tensors' formats, each group's or row's range being that of its weights."""
    reader, formats = TensorReader(model.path), packed_formats(spec)

    def pack(module: str) -> dict[str, torch.Tensor]:
        weight, form = reader.read(f"{module}.weight"), formats[module]
        return pack_weight(weight, form, *min_max_parameters(weight, form))

    (form,) = set(formats.values())
    write_quantized(ctx, model, spec, quantization_config(form, ignore), pack)
    return QuantizedCheckpoint(path=ctx.output, spec=spec)
