"""Which modules AWQ and SmoothQuant scale against each other. Needs no torch: a plan counts them.

Multiplying the input columns of some Linear layers by s and dividing what feeds them by s changes nothing but how well the
layers' weights round. What feeds them is a norm or another Linear layer, and takes the division into its own weights:

    input_layernorm          -> q_proj, k_proj, v_proj
    v_proj                   -> o_proj            only where each query head has its own KV head
    post_attention_layernorm -> gate_proj, up_proj
    up_proj                  -> down_proj

These are llm-compressor's own pairs for Llama, Mistral, Qwen2 and Qwen3, spelled out layer by layer because it divides by
zero where every layer on the right is ignored.
"""

from dataclasses import dataclass

from pipeline.spec import ModelSpec


@dataclass(frozen=True)
class Smoothing:
    """Full module names. The scales are chosen by the output of `searched`, the innermost module that holds all of `balance`."""

    smooth: str
    balance: tuple[str, ...]
    searched: str


PAIRS = (
    Smoothing("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    Smoothing("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
    Smoothing("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    Smoothing("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
)


def has_grouped_queries(model: ModelSpec) -> bool:
    """Several query heads share a KV head: v_proj then has fewer outputs than o_proj has inputs, and cannot be its divisor."""
    return model.architecture.num_kv_heads != model.architecture.num_heads


def smoothings(packed: ModelSpec) -> list[Smoothing]:
    """Of every decoder layer the pairs that help round something: a layer that stays dense is only scaled along with others."""
    rounded: dict[str, set[int]] = {}  # name within a layer -> the layers where it is
    for group in packed.linear_groups:
        if not group.format.is_dense:
            rounded.setdefault(group.name.partition("{layer}.")[2], set()).update(group.layers)
    pairs = [pair for pair in PAIRS if not (pair.searched == "self_attn.o_proj" and has_grouped_queries(packed))]
    found = []
    for layer in range(packed.architecture.num_layers):
        for pair in pairs:
            if any(layer in rounded.get(name, ()) for name in pair.balance):
                smooth, searched, *balance = (f"model.layers.{layer}.{name}" for name in (pair.smooth, pair.searched, *pair.balance))
                found.append(Smoothing(smooth, tuple(balance), searched))
    return found


def norm_smoothings(packed: ModelSpec) -> list[Smoothing]:
    """Those that norms take the division of: SmoothQuant's, for what feeds the attention and the MLP."""
    return [pair for pair in smoothings(packed) if pair.smooth.endswith("layernorm")]
