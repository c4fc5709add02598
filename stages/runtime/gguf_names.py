"""Names of tensors: Hugging Face's for a decoder of the Llama family, and those of a GGUF file (docs/gguf.md of ggml)."""

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> what llama.cpp calls it
PERMUTED = ("llama",)  # llama.cpp rotates neighbouring pairs there, Hugging Face the two halves of a head
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "rope_freqs": "rope_freqs"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`. KeyError for a module that these architectures do not have."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{LAYER[inner]}.{kind}"
