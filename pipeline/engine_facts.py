"""What engines look at in a checkpoint: names, sizes, weight schemes, cache. Read from config.json and headers, or from a spec.

A fact that a folder does not say is None. Rules about facts are in `pipeline/engines/*.yaml`; how they are read, pipeline/engine_rules.py.
"""

from typing import Any

from pipeline.fused_products import torn_product
from pipeline.layout import Frozen, ModuleGroup, WeightFormat
from pipeline.spec import ModelSpec

CLASS_NAMES = {  # model_type -> what transformers writes under `architectures`
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
GGUF_NAMES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}  # general.architecture, where it is not the model_type
GGUF_FILE = "model.gguf"  # of an export
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Scheme(Frozen):
    """How some of the weight matrices are stored, in compressed-tensors' words, whichever method wrote them.

    `group_size` -1: one scale for each row. `act_*` are of the input activations, None: they are not quantized.
    """

    format: str | None = None
    num_bits: int | None = None
    type: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    actorder: str | None = None
    act_bits: int | None = None
    act_type: str | None = None
    act_strategy: str | None = None
    act_dynamic: bool | None = None


class Facts(Frozen):
    """`stored`: safetensors, gguf, adapter, pickle, or config where there are no weights beside it."""

    stored: str
    file: str | None = None  # of a GGUF: its name
    architecture: str | None = None  # the class, `LlamaForCausalLM`; of a GGUF `general.architecture`
    model_type: str | None = None
    remote_code: bool = False
    dtype: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    context: int | None = None
    experts: int | None = None
    method: str | None = None  # quant_method; None: dense
    mixed: bool = False  # more than one scheme
    torn: str | None = None  # the first product of an engine whose parts have unlike schemes (pipeline/fused_products.py)
    schemes: tuple[Scheme, ...] = ()
    kv_type: str | None = None  # kv_cache_scheme of config.json
    kv_bits: int | None = None
    kv_strategy: str | None = None
    kv_symmetric: bool | None = None
    cache: str | None = None  # llmpress's own kv_cache.json, or q8_0 of an export
    sparsity: str | None = None  # format of a sparsity_config that names targets
    zeros: str | None = None  # pattern of the zeros that llmpress knows of, which are stored as any other number
    transforms: bool = False
    g_idx: bool | None = None  # tensors that reorder columns
    packed_dtype: str | None = None  # of the packed integers
    padded: bool | None = None  # values do not fill their words: 3 bits packed 10 to 32 bits
    misfits: int | None = None  # tensors that are not what config.json says
    misfit: str | None = None  # the first of them
    rank: int | None = None  # of an adapter
    lora_rank: int | None = None  # the least rank that servers reserve room for it with
    base_model: str | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    modules_to_save: bool | None = None

    @property
    def attention_width(self) -> int | None:
        return self.heads * self.head_dim if self.heads and self.head_dim else None

    def values(self) -> dict[str, Any]:
        """By name, without the schemes, which are rows of their own."""
        return {**self.model_dump(exclude={"schemes"}), "attention_width": self.attention_width}


SCHEME_FACTS = frozenset(Scheme.model_fields)
FACTS = frozenset(Facts.model_fields).difference({"schemes"}) | {"attention_width"}


def spec_facts(spec: ModelSpec) -> Facts:
    """Those of a model that llmpress is to make, of whose files nothing is read."""
    a, formats = spec.architecture, _formats(spec)
    schemes = () if spec.is_gguf else tuple(_scheme(form) for form in formats)
    by_bitsandbytes = any(form.by_bitsandbytes for form in formats)
    return Facts(
        stored="gguf" if spec.is_gguf else "safetensors",
        file=GGUF_FILE if spec.is_gguf else None,
        architecture=GGUF_NAMES.get(a.model_type, a.model_type) if spec.is_gguf else CLASS_NAMES.get(a.model_type),
        model_type=a.model_type,
        dtype=DTYPE_NAMES[a.dtype],
        hidden_size=a.hidden_size,
        intermediate_size=a.experts.intermediate_size if a.experts else a.intermediate_size,
        heads=a.num_heads,
        kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        context=a.max_position,
        experts=a.experts.count if a.experts else None,
        method=("bitsandbytes" if by_bitsandbytes else "compressed-tensors") if schemes else None,
        mixed=len(schemes) > 1,
        torn=torn_product({name: group.format for group in spec.linear_groups if not group.experts for name in group.module_names}),
        schemes=schemes,
        cache=spec.kv_cache.mode,
        zeros=spec.sparsity.pattern if spec.sparsity else None,
        misfits=0,
    )


def _formats(spec: ModelSpec) -> list[WeightFormat]:
    """The different ones of the linear weights, dense aside."""
    linear: tuple[ModuleGroup, ...] = spec.linear_groups
    return list(dict.fromkeys(group.format for group in linear if not group.format.is_dense))


def _scheme(form: WeightFormat) -> Scheme:
    """As config.json will say it."""
    if form.by_bitsandbytes:
        return Scheme(num_bits=form.num_bits)
    kind = "float" if form.layout == "float-quantized" else "int"
    scheme = Scheme(
        format=form.layout,
        num_bits=form.num_bits,
        type=kind,
        strategy="group" if form.group_size else "channel",
        group_size=form.group_size or -1,
        symmetric=form.symmetric,
    )
    inputs = {"act_bits": 8, "act_type": kind, "act_strategy": "token", "act_dynamic": True}
    return scheme.model_copy(update=inputs) if form.rounds_inputs else scheme
