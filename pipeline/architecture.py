"""What an architecture is made of, from the dozen integers of its configuration: which modules, of which shapes, in which layers."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import did_you_mean
from pipeline.layout import DType, Frozen, ModuleGroup
from pipeline.model_config import CONFIGS, ModelConfig, WithExperts, parse

TORCH_DTYPES: dict[str, DType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
EXPERT_NAMES = {  # of gate, up and down projection as they stand in files; transformers 5 stacks them in memory, and unstacks to save
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


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
    rope_type: str = "default"  # how positions beyond those of the pretraining were made room for: llama3, linear, yarn, ...

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
            rope_type=given.rope_type,
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
