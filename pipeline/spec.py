"""Shapes to bytes, in closed form: what a model is before any weight of it is read.

A `ModelSpec` is a tuple of module groups (name pattern, layers, shape, `WeightFormat`) plus the layout of its KV cache,
all of it derived from the dozen integers of an `Architecture`. It predicts the exact tensor table of the checkpoint on
disk: names, dtypes, shapes, hence bytes. Example: a 14336 x 4096 linear layer packed at 4 bits with symmetric groups of 128 is
14336 * 512 int32 words (29,360,128 B) + 14336 * 32 bf16 scales (917,504 B) + its shape (16 B) = 30,277,648 B.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pipeline.errors import did_you_mean
from pipeline.headers import ITEM_BYTES, TensorEntry
from pipeline.layout import CacheMode, DType, Frozen, KVCacheSpec, ModuleGroup, WeightFormat
from pipeline.model_config import CONFIGS, ModelConfig, QuantizationConfig, WithExperts, parse

TORCH_DTYPES: dict[str, DType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
EXPERT_NAMES = {  # of gate, up and down projection as they stand in files; transformers 5 stacks them in memory, and unstacks to save
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
IGNORABLE = ("*rotary_emb.inv_freq",)  # left in files by old savers; recomputed by every reader


class Experts(Frozen):
    """What takes the place of the MLP in every decoder layer but `dense_layers`: several, of which a router picks some for each token."""

    count: int
    per_token: int
    intermediate_size: int  # of each
    dense_layers: tuple[int, ...] = ()  # have one MLP of the architecture's `intermediate_size`


class Architecture(Frozen):
    """The integers that decide every shape of a decoder-only model of the Llama family."""

    model_type: str
    dtype: DType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Architecture":
        """Read a Hugging Face `config.json`. ValueError names the field that is missing or makes no sense."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIGS:
            raise ValueError(f"model_type {model_type!r} is not supported{did_you_mean(str(model_type), CONFIGS)}")
        given = parse(CONFIGS[model_type], config, "config.json: ")
        dtype = (given.dtype or given.torch_dtype or "float32").removeprefix("torch.")
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"config.json: dtype {dtype!r} is not supported; there are: {', '.join(TORCH_DTYPES)}")
        bias = bool(given.attention_bias) and model_type in ("llama", "qwen3", "qwen3_moe")
        return cls(
            model_type=model_type,
            dtype=TORCH_DTYPES[dtype],
            vocab_size=given.vocab_size,
            hidden_size=given.hidden_size,
            intermediate_size=given.intermediate_size,
            num_layers=given.num_hidden_layers,
            num_heads=given.num_attention_heads,
            num_kv_heads=given.kv_heads,
            head_dim=given.head_width,
            max_position=given.max_position_embeddings,
            tied=bool(given.tie_word_embeddings),
            qkv_bias=bias or model_type == "qwen2",
            o_bias=bias,
            mlp_bias=bool(given.mlp_bias) and model_type == "llama",
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            experts=_experts(given),
        )

    def groups(self) -> Iterator[ModuleGroup]:
        """Every module that has tensors."""
        hidden, layers = self.hidden_size, tuple(range(self.num_layers))
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield ModuleGroup(name="model.embed_tokens", kind="embedding", shape=(self.vocab_size, hidden))
        yield _norm("input_layernorm", hidden, layers)
        yield _linear("self_attn.q_proj", (q, hidden), layers, self.qkv_bias)
        yield _linear("self_attn.k_proj", (kv, hidden), layers, self.qkv_bias)
        yield _linear("self_attn.v_proj", (kv, hidden), layers, self.qkv_bias)
        yield _linear("self_attn.o_proj", (hidden, q), layers, self.o_bias)
        if self.qk_norm:
            yield _norm("self_attn.q_norm", self.head_dim, layers)
            yield _norm("self_attn.k_norm", self.head_dim, layers)
        yield _norm("post_attention_layernorm", hidden, layers)
        dense = self.experts.dense_layers if self.experts else layers
        if dense:
            yield _linear("mlp.gate_proj", (self.intermediate_size, hidden), dense, self.mlp_bias)
            yield _linear("mlp.up_proj", (self.intermediate_size, hidden), dense, self.mlp_bias)
            yield _linear("mlp.down_proj", (hidden, self.intermediate_size), dense, self.mlp_bias)
        if self.experts:
            yield from self._expert_groups(self.experts, tuple(layer for layer in layers if layer not in dense))
        yield ModuleGroup(name="model.norm", kind="norm", shape=(hidden,))
        if not self.tied:
            yield ModuleGroup(name="lm_head", kind="linear", shape=(self.vocab_size, hidden))

    def _expert_groups(self, experts: Experts, layers: tuple[int, ...]) -> Iterator[ModuleGroup]:
        block, gate, up, down = EXPERT_NAMES[self.model_type]
        hidden, width, each = self.hidden_size, experts.intermediate_size, tuple(range(experts.count))
        yield ModuleGroup(name=f"model.layers.{{layer}}.{block}.gate", kind="router", shape=(experts.count, hidden), layers=layers)
        for name, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
            yield _linear(f"{block}.experts.{{expert}}.{name}", shape, layers).model_copy(update={"experts": each})


def _experts(given: ModelConfig) -> Experts | None:
    if not isinstance(given, WithExperts):
        return None
    return Experts(
        count=given.num_local_experts,
        per_token=given.experts_per_token,
        intermediate_size=given.expert_width,
        dense_layers=given.dense_layers,
    )


def _linear(name: str, shape: tuple[int, int], layers: tuple[int, ...], bias: bool = False) -> ModuleGroup:
    return ModuleGroup(name=f"model.layers.{{layer}}.{name}", kind="linear", shape=shape, layers=layers, bias=bias)


def _norm(name: str, width: int, layers: tuple[int, ...]) -> ModuleGroup:
    return ModuleGroup(name=f"model.layers.{{layer}}.{name}", kind="norm", shape=(width,), layers=layers)


class ModelSpec(Frozen):
    """A model as its checkpoint will stand on disk. Build it with `of` or `from_config`, change it with `with_format`."""

    architecture: Architecture
    groups: tuple[ModuleGroup, ...]
    kv_cache: KVCacheSpec

    @classmethod
    def of(cls, architecture: Architecture) -> "ModelSpec":
        """The dense model of that architecture, with a 16-bit cache."""
        cache = KVCacheSpec(layers=architecture.num_layers, kv_heads=architecture.num_kv_heads, head_dim=architecture.head_dim)
        return cls(architecture=architecture, groups=tuple(architecture.groups()), kv_cache=cache)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """From a `config.json`, its compressed-tensors `quantization_config` included. ValueError where it cannot be."""
        spec = cls.of(Architecture.from_config(config))
        quantization = config.get("quantization_config")
        if quantization is None:
            return spec
        method, layout = quantization.get("quant_method"), quantization.get("format")
        if method != "compressed-tensors" or layout != "pack-quantized":
            raise ValueError(f"the checkpoint is quantized as {method}/{layout}; only compressed-tensors/pack-quantized is read")
        given = parse(QuantizationConfig, quantization, "config.json: quantization_config.")
        groups = list(given.config_groups.values())
        if len(groups) != 1 or groups[0].targets != ["Linear"] or groups[0].input_activations:
            raise ValueError("the checkpoint mixes quantization schemes; only one weight-only scheme over all Linear layers is read")
        weights = groups[0].weights
        if weights.type != "int" or weights.strategy != "group":
            raise ValueError(f"the checkpoint's weights are {weights.type} by {weights.strategy}; only int by group is read")
        if weights.group_size is None or weights.group_size < 1:
            raise ValueError(f"config.json: quantization_config: group_size is {weights.group_size}; groups need at least one column")
        form = WeightFormat(num_bits=weights.num_bits, group_size=weights.group_size, symmetric=weights.symmetric)
        return spec.with_format(form, tuple(given.ignore or ()))

    @property
    def dtype(self) -> DType:
        return self.architecture.dtype

    @property
    def is_dense(self) -> bool:
        return all(group.format.is_dense for group in self.groups)

    @property
    def linear_groups(self) -> tuple[ModuleGroup, ...]:
        return tuple(group for group in self.groups if group.kind == "linear")

    def with_format(self, form: WeightFormat, ignore: tuple[str, ...] = ()) -> "ModelSpec":
        """Every Linear layer not named in `ignore` (exact, or `re:` pattern matched from the start) stored as `form`.

        ValueError names each layer whose input width the group size does not divide, and a size that would.
        """
        groups: list[ModuleGroup] = []
        misfits: list[str] = []
        for group in self.groups:
            if group.kind != "linear":
                groups.append(group)
                continue
            chosen, rest = _split(group, ignore)
            if chosen and form.group_size and group.shape[1] % form.group_size:
                misfits.append(f"{group.pattern} ({group.shape[1]})")
            groups += [part.model_copy(update={"format": form}) for part in chosen] + rest
        if misfits:
            named = ", ".join(misfits)
            common = math.gcd(*(group.shape[1] for group in self.linear_groups))
            fitting = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if common % size == 0)
            raise ValueError(
                f"group_size: {form.group_size} does not divide the columns of {named}; {fitting} divides those of every layer"
            )
        return self.model_copy(update={"groups": tuple(groups)})

    def dense(self) -> "ModelSpec":
        """The same model with every weight dense, its cache layout kept."""
        return ModelSpec.of(self.architecture).with_cache(self.kv_cache.mode)

    def resized(self, architecture: Architecture) -> "ModelSpec":
        """The dense model of another architecture, its cache stored as this one's.

        ValueError for a mixture of experts: which experts, and which neurons of each, would go is not settled yet.
        """
        if self.architecture.experts:
            raise ValueError(f"experts are not pruned yet, and {self.architecture.model_type} has them; take the stage out of the order")
        return ModelSpec.of(architecture).with_cache(self.kv_cache.mode)

    def with_cache(self, mode: CacheMode | None) -> "ModelSpec":
        """The same model, its KV cache stored in that mode."""
        return self.model_copy(update={"kv_cache": self.kv_cache.model_copy(update={"mode": mode})})

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of the checkpoint."""
        return {
            f"{module}.{suffix}": entry
            for group in self.groups
            for module in group.module_names
            for suffix, entry in group.tensors(self.dtype).items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the checkpoint's files, headers not counted."""
        return sum(
            group.count * math.prod(shape) * ITEM_BYTES[dtype]
            for group in self.groups
            for dtype, shape in group.tensors(self.dtype).values()
        )

    @property
    def num_parameters(self) -> int:
        return sum(group.num_parameters for group in self.groups)

    @property
    def active_parameters(self) -> int:
        """Those that compute on one token: of a mixture of experts, of which each token visits a few, fewer than `num_parameters`."""
        experts, routed = self.architecture.experts, sum(group.num_parameters for group in self.groups if group.experts)
        return self.num_parameters - (routed - routed * experts.per_token // experts.count if experts else 0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_parameters

    def differences(self, table: Mapping[str, TensorEntry]) -> list[str]:
        """How a checkpoint's tensor table departs from this spec; empty when it is exactly this model."""
        expected = self.tensors()
        tied_copy = {"lm_head.weight"} if self.architecture.tied else set()
        extra = [
            name
            for name in table
            if name not in expected and name not in tied_copy and not any(fnmatch.fnmatch(name, p) for p in IGNORABLE)
        ]
        problems = [f"{name} is missing" for name in expected if name not in table] + [f"{name} is unexpected" for name in extra]
        for name, (dtype, shape) in expected.items():
            found = table.get(name)
            if found and (found.dtype, found.shape) != (dtype, shape):
                problems.append(f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        return problems


def ignored(module: str, ignore: tuple[str, ...]) -> bool:
    """compressed-tensors' own rule for module names: exact, or `re:` and a pattern matched from the start.

    ValueError for a pattern that is no regular expression.
    """
    return any(_pattern(p[3:]).match(module) is not None if p.startswith("re:") else p == module for p in ignore)


def _split(group: ModuleGroup, ignore: tuple[str, ...]) -> tuple[list[ModuleGroup], list[ModuleGroup]]:
    """The modules that `ignore` does not name, and the others."""
    near = tuple(entry for entry in ignore if entry.startswith("re:") or group.may_hold(entry))
    return group.split(lambda name: not ignored(name, near)) if near else ([group], [])


@cache
def _pattern(written: str) -> re.Pattern[str]:
    try:
        return re.compile(written)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"ignore: 're:{written}' is not a regular expression ({error})") from None
