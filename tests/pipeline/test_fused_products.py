"""Products of engines: which layers are one, and where their parts are unlike."""

from pipeline.engine_contract import answers
from pipeline.engine_facts import spec_facts
from pipeline.fused_products import product_of, torn_product
from pipeline.layout import WeightFormat
from pipeline.serving import serving_lines
from pipeline.spec import ModelSpec
from tests.pipeline.test_layer_bits import LLAMA, form

LAYER = "model.layers.1."


def test_parts_have_the_name_of_their_product() -> None:
    assert {product_of(f"{LAYER}self_attn.{part}_proj") for part in "qkv"} == {f"{LAYER}self_attn.qkv_proj"}
    assert (
        product_of(f"{LAYER}mlp.up_proj") == f"{LAYER}mlp.gate_up_proj" and product_of(f"{LAYER}mlp.down_proj") == f"{LAYER}mlp.down_proj"
    )


def test_the_first_product_of_unlike_parts_is_found() -> None:
    alike = {f"{LAYER}mlp.gate_proj": 4, f"{LAYER}mlp.up_proj": 4, f"{LAYER}mlp.down_proj": 8, "model.layers.2.mlp.gate_proj": 3}
    assert torn_product(alike) is None and torn_product(alike | {f"{LAYER}mlp.up_proj": 3}) == f"{LAYER}mlp.gate_up_proj"


def test_vllm_is_not_offered_a_model_that_it_would_read_wrongly() -> None:
    dense = ModelSpec.from_config(LLAMA)
    gate, up, down = (dense.with_formats({f"{LAYER}mlp.{name}_proj": form(4)}) for name in ("gate", "up", "down"))
    both = gate.with_formats({f"{LAYER}mlp.up_proj": WeightFormat(num_bits=8, group_size=32)})
    for torn in (gate, up, both):
        assert "vllm" not in [line.engine for line in serving_lines(torn)]
        refused = next(found for found in answers(spec_facts(torn), "model") if found.engine == "vllm")
        assert not refused.loads and any(f"{LAYER}mlp.gate_up_proj is one product in vLLM" in finding.says for finding in refused.reasons)
    for whole in (dense, down, both.with_formats({f"{LAYER}mlp.up_proj": form(4)})):
        assert "vllm" in [line.engine for line in serving_lines(whole)]
