"""Which of llama.cpp's types each tensor of a GGUF file has, by format: the mixes of `llama_model_quantize`, as arithmetic on a spec.

A format is a mix: Q4_K_M stores most matrices as Q4_K and those that hurt most, some of the value and down projections and the output, as
Q6_K. A row that is no whole number of a type's blocks falls back to a larger type. Vectors stay F32. Rules: llama-quant.cpp of llama.cpp
(llama_tensor_get_type_impl, tensor_type_fallback), as built into llama-cpp-python 0.3.36; tests hold real files to them.

    gguf_spec(model, "Q4_K_M").nbytes      # bytes of tensor data, exact
"""

from collections.abc import Iterator
from typing import Literal

from pipeline.architecture import Architecture
from pipeline.ggml import BLOCKS
from pipeline.layout import ModuleGroup, WeightFormat
from pipeline.spec import ModelSpec

Format = Literal["F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"]
BASE: dict[str, str] = {"F16": "F16", "Q8_0": "Q8_0", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q2_K": "Q2_K"}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # blocks of 256 -> of 32
LAYERS_OF_70B = 80  # llama.cpp tells this size, whose value projections are small beside the rest, by its layers
ROPE_FREQS = "rope_freqs"  # of rope type llama3: what the rotary frequencies are divided by, a float for each pair of a head


def gguf_spec(model: ModelSpec, form: Format) -> ModelSpec:
    """The dense `model` as its GGUF file of that format will hold it; an INT8 cache is llama.cpp's. Not every block format holds 0, so that
    nothing is said of zeros."""
    groups = [part for group in model.groups for part in _typed(group, model.architecture, form)]
    if model.architecture.rope_type == "llama3":
        pairs = model.architecture.head_dim // 2
        groups.append(ModuleGroup(name=ROPE_FREQS, kind="norm", shape=(pairs,), format=WeightFormat(ggml="F32")))
    stored = model.model_copy(update={"groups": tuple(groups)})
    return stored.with_sparsity(None).with_cache("q8_0" if model.kv_cache.mode else None)


def unquantized(model: ModelSpec) -> ModelSpec:
    """The file that llama.cpp quantizes: matrices in the model's own dtype, so that nothing is rounded twice."""
    stored = gguf_spec(model, "F16")
    own = WeightFormat(ggml=model.dtype)
    groups = tuple(group if group.kind == "norm" else group.model_copy(update={"format": own}) for group in stored.groups)
    return stored.model_copy(update={"groups": groups})


def fallbacks(model: ModelSpec, form: Format) -> list[str]:
    """Sentences that name the matrices whose rows are no whole number of blocks, and what they are stored as."""
    found: dict[tuple[str, str, int], list[str]] = {}
    for group in model.groups:
        if group.kind == "norm":
            continue
        for wanted in dict.fromkeys(_wanted(group, layer, model.architecture, form) for layer in group.layers or (0,)):
            stored = _fitting(wanted, group.shape[-1])
            if stored != wanted:
                found.setdefault((wanted, stored, group.shape[-1]), []).append(group.pattern)
    return [
        f"rows of {columns} are no multiple of {BLOCKS[wanted][0]}, so that {', '.join(names)} fall back from {wanted} to {stored}"
        for (wanted, stored, columns), names in found.items()
    ]


def _typed(group: ModuleGroup, shape: Architecture, form: Format) -> Iterator[ModuleGroup]:
    """The group's modules, those of one type together."""
    if group.kind == "norm":
        yield group.model_copy(update={"format": WeightFormat(ggml="F32")})
        return
    layers: dict[str, list[int]] = {}
    for layer in group.layers or (0,):
        layers.setdefault(_fitting(_wanted(group, layer, shape, form), group.shape[-1]), []).append(layer)
    for kind, held in layers.items():
        yield group.model_copy(update={"format": WeightFormat(ggml=kind), "layers": tuple(held) if group.layers else ()})


def _wanted(group: ModuleGroup, layer: int, shape: Architecture, form: Format) -> str:
    """The type of that layer's matrix, were its rows any length."""
    base = BASE[form]
    if form in ("F16", "Q8_0"):
        return base
    name = group.name.rpartition(".")[2]
    if name == "lm_head" or (name == "embed_tokens" and shape.tied):
        return "Q8_0" if group.shape[-1] % BLOCKS[base][0] else "Q6_K"
    if name == "v_proj":
        return _value_projection(layer, shape, form)
    if name in ("down_proj", "o_proj") and form == "Q2_K":
        return "Q3_K"
    if name == "down_proj" and more_bits(layer, shape.num_layers):
        return "Q6_K"
    return base


def _value_projection(layer: int, shape: Architecture, form: Format) -> str:
    base = BASE[form]
    if form == "Q2_K":
        base = "Q4_K" if shape.num_heads // shape.num_kv_heads >= 4 else "Q3_K"
    elif more_bits(layer, shape.num_layers):
        base = "Q6_K"
    return "Q5_K" if base in ("Q3_K", "Q4_K") and _is_70b(shape) else base


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(shape: Architecture) -> bool:
    if shape.num_layers != LAYERS_OF_70B:
        return False
    return shape.model_type == "qwen2" or (shape.model_type in ("llama", "mistral") and shape.num_heads != shape.num_kv_heads)


def _fitting(kind: str, columns: int) -> str:
    """That type, or a larger one whose blocks fill such a row."""
    for candidate in (kind, FALLBACK.get(kind, kind)):
        if columns % BLOCKS[candidate][0] == 0:
            return candidate
    return "F16"
