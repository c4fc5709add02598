"""Which Linear layers engines compute in one product: queries, keys and values; gate and up projection. Names are vLLM's.

vLLM has one scheme for a product. In its compressed-tensors code (model_executor/layers/quantization/compressed_tensors/utils.py, read in
November 2026) `_match_fused_layer` takes that of the first part where each part has one, so that parts at other bits are read wrongly, and
`should_ignore_layer` refuses a product of which some parts are left dense.
"""

from collections.abc import Hashable, Mapping

PRODUCTS = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


def product_of(module: str) -> str:
    """The name of the product that a module is part of; its own where it is computed alone."""
    for part, product in PRODUCTS.items():
        if module.endswith(f".{part}"):
            return module.removesuffix(part) + product
    return module


def torn_product(schemes: Mapping[str, Hashable]) -> str | None:
    """The first product whose parts have unlike schemes, by module name."""
    found: dict[str, Hashable] = {}
    return next((product for module, scheme in schemes.items() if found.setdefault(product := product_of(module), scheme) != scheme), None)
