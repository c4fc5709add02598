"""The facts of a checkpoint on disk: config.json, safetensors headers, llmpress's cache sidecar; a GGUF header; an adapter's config.

No weight is read. Methods name the same things differently (`bits`, `w_bit`, `num_bits`); here they become one `Scheme`. Formats:
compressed-tensors 0.19 (QuantizationConfig), AutoGPTQ's and AutoAWQ's config, transformers 5.17 (BitsAndBytesConfig, FineGrainedFP8Config),
PEFT 0.21 (LoraConfig), GGUF version 3.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.architecture import Architecture
from pipeline.engine_facts import Facts, Scheme
from pipeline.fused_products import torn_product
from pipeline.gguf_file import read_gguf
from pipeline.headers import CheckpointFileError, TensorEntry, read_json, tensor_table
from pipeline.kv_sidecar import read_cache
from pipeline.model_config import CONFIGS, Heads, Positions, Width, parse

CONFIG, MANIFEST, ADAPTER, INDEX, WEIGHTS = (
    "config.json",
    "artifact.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.33.0 can reserve (config/lora.py)


class _Lenient(BaseModel):
    """Strict in types, silent about fields that no rule asks for."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Config(_Lenient):
    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    moe_intermediate_size: Width | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    max_position_embeddings: Positions | None = None
    num_local_experts: int | None = None
    num_experts: int | None = None


class _Arguments(_Lenient):
    """compressed-tensors' QuantizationArgs."""

    num_bits: int | None = None
    type: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool | str = False
    actorder: str | bool | None = None


class _Group(_Lenient):
    targets: list[str] | None = None
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    format: str | None = None


class _Quantization(_Lenient):
    quant_method: str | None = None
    format: str | None = None
    config_groups: dict[str, _Group] | None = None
    kv_cache_scheme: _Arguments | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    bits: int | None = Field(default=None, ge=1)
    w_bit: int | None = Field(default=None, ge=1)
    group_size: int | None = None
    q_group_size: int | None = None
    sym: bool | None = None
    zero_point: bool | None = None
    desc_act: bool | None = None
    version: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    weight_block_size: list[int] | None = None
    activation_scheme: str | None = None


class _Lora(_Lenient):
    r: int = Field(ge=1)
    base_model_name_or_path: str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None


def read_facts(path: Path) -> Facts:
    """Of a folder or a GGUF file. InputProblems, CheckpointFileError (both ValueErrors) and OSError say why it cannot be read."""
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path)
    if not path.is_dir():
        raise CheckpointFileError(f"{path} is not a folder; give the folder of a checkpoint or a GGUF file")
    weights = any((path / name).is_file() for name in (WEIGHTS, INDEX))
    files = sorted(path.glob("*.gguf"))
    if files and not weights:
        return _gguf(files[0])
    if (path / CONFIG).is_file():
        return _checkpoint(path, weights)
    if (path / ADAPTER).is_file():
        return _adapter(read_json(path / ADAPTER))
    raise CheckpointFileError(f"{path} holds no {CONFIG}; give the folder of a checkpoint, an adapter or a GGUF file")


def _checkpoint(path: Path, weights: bool) -> Facts:
    content, cache = read_json(path / CONFIG), read_cache(path)
    facts = config_facts(content).model_copy(update={"cache": cache.mode if cache else None, "zeros": _zeros(path)})
    if not weights:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        return facts.model_copy(update={"stored": "pickle" if pickled else "config"})
    return facts.model_copy(update={"stored": "safetensors", **_header_facts(content, facts, tensor_table(path))})


def _zeros(path: Path) -> str | None:
    """The pattern that llmpress wrote into its own artifact.json; another program's file of that name says nothing."""
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    match manifest:
        case {"spec": {"sparsity": {"pattern": str(pattern)}}}:
            return pattern
    return None


def config_facts(content: Mapping[str, Any]) -> Facts:
    """Of a config.json alone. InputProblems names each field that makes no sense."""
    config = parse(_Config, _text_config(content), f"{CONFIG}: ")
    quantized = content.get("quantization_config") or content.get("compression_config") or {}  # the latter is what came first
    if not isinstance(quantized, dict):
        raise CheckpointFileError(f"{CONFIG}: quantization_config is not a JSON object; copy it again")
    given = parse(_Quantization, quantized, f"{CONFIG}: quantization_config.")
    schemes, groups = tuple(dict.fromkeys(_schemes(given))), (given.config_groups or {}).values()
    heads = config.num_attention_heads
    narrow = config.hidden_size // heads if config.hidden_size and heads else None
    kv = given.kv_cache_scheme
    sparse = (given.sparsity_config or {}) if (given.sparsity_config or {}).get("targets") else {}
    return Facts(
        stored="config",
        architecture=config.architectures[0] if config.architectures else None,
        model_type=config.model_type,
        remote_code=bool(config.auto_map),
        dtype=(config.dtype or config.torch_dtype or "").removeprefix("torch.") or None,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size or config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or narrow,
        context=config.max_position_embeddings,
        experts=config.num_local_experts or config.num_experts,
        method=_method(given),
        mixed=len(schemes) > 1,
        torn=torn_product({name: number for number, group in enumerate(groups) for name in group.targets or ()}),
        schemes=schemes,
        kv_type=kv.type if kv else None,
        kv_bits=kv.num_bits if kv else None,
        kv_strategy=kv.strategy if kv else None,
        kv_symmetric=kv.symmetric if kv else None,
        sparsity=str(sparse.get("format", "dense")) if sparse else None,
        transforms=bool((given.transform_config or {}).get("config_groups")),
    )


def _text_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """A model of text and images has the sizes of its language model in an object of their own, and its names outside."""
    text = content.get("text_config")
    named = {key: content[key] for key in ("architectures", "model_type") if content.get(key)}
    return {**content, **(text if isinstance(text, dict) else {}), **named}


def _method(given: _Quantization) -> str | None:
    if given.quant_method is None and (given.load_in_4bit or given.load_in_8bit):
        return "bitsandbytes"
    if given.quant_method is None and given.config_groups is not None:
        return "compressed-tensors"
    return given.quant_method


def _schemes(given: _Quantization) -> Iterator[Scheme]:
    method = _method(given)
    if method == "compressed-tensors":
        for group in (given.config_groups or {}).values():
            if group.weights is not None:
                yield _compressed(group.weights, group.input_activations, group.format or given.format)
    elif method in ("gptq", "awq"):
        group_size = given.q_group_size if given.group_size is None else given.group_size
        symmetric = given.sym if method == "gptq" else None if given.zero_point is None else not given.zero_point
        yield Scheme(
            format=given.version if method == "awq" else None, num_bits=given.bits or given.w_bit, type="int", group_size=group_size,
            strategy="channel" if group_size == -1 else "group", symmetric=symmetric, actorder="group" if given.desc_act else None,
        )  # fmt: skip
    elif method == "fp8":
        yield Scheme(
            num_bits=8, type="float", strategy="block" if given.weight_block_size else "tensor", symmetric=True,
            act_bits=8, act_type="float", act_dynamic=given.activation_scheme != "static",
        )  # fmt: skip
    elif method == "bitsandbytes":
        yield Scheme(num_bits=4 if given.load_in_4bit else 8)


def _compressed(weights: _Arguments, inputs: _Arguments | None, form: str | None) -> Scheme:
    actorder = weights.actorder if isinstance(weights.actorder, str) else "group" if weights.actorder else None
    return Scheme(
        format=form, num_bits=weights.num_bits, type=weights.type, strategy=weights.strategy,
        group_size=-1 if weights.strategy == "channel" else weights.group_size, symmetric=weights.symmetric, actorder=actorder,
        act_bits=inputs.num_bits if inputs else None, act_type=inputs.type if inputs else None,
        act_strategy=inputs.strategy if inputs else None, act_dynamic=bool(inputs.dynamic) if inputs else None,
    )  # fmt: skip


def _header_facts(content: Mapping[str, Any], facts: Facts, table: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """What the tensor table adds, `misfits` and `padded` only for architectures whose shapes llmpress knows."""
    packed = [entry.dtype for name, entry in table.items() if name.endswith((".weight_packed", ".qweight"))]
    found: dict[str, Any] = {
        "g_idx": any(name.endswith(".weight_g_idx") for name in table),
        "packed_dtype": packed[0] if packed else None,
    }
    if facts.model_type not in CONFIGS:
        return found
    try:
        architecture = Architecture.from_config(content)
    except ValueError as error:
        return {**found, "misfits": 1, "misfit": str(error)}
    misfits = [] if facts.method == "bitsandbytes" else list(_misfits(architecture, table))
    padded = _padded(architecture, facts, table) if found["packed_dtype"] == "I32" else None
    return {**found, "padded": padded, "misfits": len(misfits), "misfit": misfits[0] if misfits else None}


def _misfits(architecture: Architecture, table: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Each module whose tensor is missing, or is not of the size that config.json says; of packed ones, the side that packing leaves."""
    for group in architecture.groups():
        for module in group.module_names:
            name = next((f"{module}.{suffix}" for suffix in ("weight", "weight_packed", "qweight") if f"{module}.{suffix}" in table), None)
            if name is None:
                yield f"{module} is missing"
                continue
            shape, wanted = table[name].shape, group.shape
            whole = name.endswith(".weight")
            fits = shape == wanted if whole else shape[0] == wanted[0] if name.endswith("packed") else bool({*shape} & {*wanted})
            if not fits:
                yield f"{name} is {list(shape)} and config.json says {list(wanted)}{'' if whole else ' before packing'}"


def _padded(architecture: Architecture, facts: Facts, table: Mapping[str, TensorEntry]) -> bool | None:
    """Whether each word holds a whole number of values, as compressed-tensors packed 3 bits before it filled words to the last bit."""
    bits = facts.schemes[0].num_bits if len(facts.schemes) == 1 else None
    if not bits or 32 % bits == 0:
        return None
    for group in architecture.groups():
        entry = table.get(f"{group.module_names[0]}.weight_packed")
        if entry is not None:
            return entry.shape[-1] == math.ceil(group.shape[1] / (32 // bits)) != math.ceil(group.shape[1] * bits / 32)
    return None


def _adapter(content: Mapping[str, Any]) -> Facts:
    given = parse(_Lora, content, f"{ADAPTER}: ")
    return Facts(
        stored="adapter", rank=given.r, lora_rank=next((rank for rank in LORA_RANKS if rank >= given.r), None),
        base_model=given.base_model_name_or_path, use_dora=given.use_dora, lora_bias=given.lora_bias,
        modules_to_save=bool(given.modules_to_save),
    )  # fmt: skip


def _gguf(file: Path) -> Facts:
    """Numbers that differ from layer to layer are arrays there, and stay unknown here."""
    metadata = read_gguf(file).metadata
    architecture = metadata.get("general.architecture")

    def number(key: str) -> int | None:
        value = metadata.get(f"{architecture}.{key}")
        return value if isinstance(value, int) and value > 0 else None

    heads, hidden = number("attention.head_count"), number("embedding_length")
    return Facts(
        stored="gguf", file=file.name, architecture=architecture if isinstance(architecture, str) else None, hidden_size=hidden,
        intermediate_size=number("feed_forward_length"), heads=heads, kv_heads=number("attention.head_count_kv") or heads,
        head_dim=number("attention.key_length") or (hidden // heads if hidden and heads else None), context=number("context_length"),
        experts=number("expert_count"),
    )  # fmt: skip
