"""What a config.json says of its weights: every format of ours is read back, and what is not read is refused by field."""

import math
import re
from typing import Any

import pytest

from pipeline.engine_facts import spec_facts
from pipeline.layout import Layout, WeightFormat
from pipeline.spec import ModelSpec

CONFIG = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16",
}  # fmt: skip
BY_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
BY_ROW = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def bitsandbytes(**settings: Any) -> dict[str, Any]:
    return CONFIG | {"quantization_config": {"quant_method": "bitsandbytes", **settings}}


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    named = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return CONFIG | {"quantization_config": named}


def dense_modules(spec: ModelSpec) -> set[str]:
    return {name for group in spec.linear_groups if group.format.is_dense for name in group.module_names}


def test_bitsandbytes_is_read_with_transformers_defaults() -> None:
    eight, four = ModelSpec.from_config(bitsandbytes(load_in_8bit=True)), ModelSpec.from_config(bitsandbytes(load_in_4bit=True))
    forms = [spec.linear_groups[0].format for spec in (eight, four)]
    assert forms == [WeightFormat.of("llm_int8", threshold=6.0), WeightFormat.of("fp4")]
    assert dense_modules(eight) == dense_modules(four) == {"lm_head"}


def test_a_skipped_module_is_found_as_transformers_finds_it() -> None:
    """As a pattern from the start of a name, so that layer 1 takes layers 10 and 11 along, or as a name's end."""
    skipped = ["model.layers.1.mlp.up_proj", "model.layers.1", "k_proj"]
    found = [dense_modules(ModelSpec.from_config(bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=[key]))) for key in skipped]
    assert found[0] == {"model.layers.1.mlp.up_proj"}
    assert {name.split(".")[2] for name in found[1]} == {"1", "10", "11"} and len(found[1]) == 3 * 7
    assert found[2] == {f"model.layers.{layer}.self_attn.k_proj" for layer in range(12)}


@pytest.mark.parametrize(
    ("layout", "weights", "inputs"),
    [("int-quantized", BY_ROW, BY_TOKEN), ("float-quantized", BY_ROW | {"type": "float"}, BY_TOKEN | {"type": "float"})],
)
def test_weights_by_row_and_inputs_by_token_are_read(layout: Layout, weights: dict[str, Any], inputs: dict[str, Any]) -> None:
    assert ModelSpec.from_config(compressed(layout, weights, inputs)).linear_groups[0].format == WeightFormat.of(layout)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (bitsandbytes(), "bitsandbytes with neither load_in_4bit nor load_in_8bit; write one of them"),
        (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage is bfloat16; only uint8 is read"),
        (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type is 'int4'; input should be 'nf4' or 'fp4'"),
        (compressed("int-quantized", BY_ROW, BY_TOKEN | {"dynamic": False}), "only 8 bits, symmetric, by channel and dynamically by token"),
        (compressed("int-quantized", BY_ROW | {"strategy": "tensor"}, BY_TOKEN), "weights of 8 bits by tensor and inputs by token"),
        (compressed("float-quantized", BY_ROW, BY_TOKEN), "the checkpoint is float-quantized with weights of 8 bits by channel"),
        (compressed("int-quantized", BY_ROW, None), "inputs by None"),
        (compressed("pack-quantized", BY_ROW, BY_TOKEN), "packs weights whose inputs are rounded too"),
        (compressed("nvfp4-pack-quantized", BY_ROW, None), "quantized as compressed-tensors/nvfp4-pack-quantized; only compressed-tensors"),
    ],
    ids=str,
)
def test_what_is_not_read_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ModelSpec.from_config(config)


def test_bytes_of_each_format_follow_from_its_blocks_and_rows() -> None:
    def stored(form: WeightFormat) -> int:
        spec = ModelSpec.from_config(CONFIG)
        (group,) = (group for group in spec.with_format(form).groups if group.name.endswith("up_proj"))
        sizes = {"F32": 4, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}
        return sum(sizes[dtype] * math.prod(shape) for dtype, shape in group.tensors("BF16").values())

    weights = 512 * 256
    json_bytes = len('{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [512, 256]}')
    nested = len(', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": ') + 24
    assert stored(WeightFormat.of("int-quantized")) == stored(WeightFormat.of("float-quantized")) == weights + 512 * 2
    assert stored(WeightFormat(num_bits=8)) == weights + 512 * 2 + 16
    assert stored(WeightFormat.of("llm_int8", threshold=6.0)) == weights + 512 * 4 + 1
    assert stored(WeightFormat.of("nf4")) == weights // 2 + weights // 64 * 4 + 16 * 4 + json_bytes
    double = weights // 2 + weights // 64 + weights // 64 // 256 * 4 + (256 + 16) * 4 + json_bytes + nested
    assert stored(WeightFormat.of("fp4", double_quant=True)) == double


def test_engines_are_told_what_a_planned_model_will_be() -> None:
    spec = ModelSpec.from_config(CONFIG)
    assert spec_facts(spec.with_format(WeightFormat.of("nf4"))).method == "bitsandbytes"
    (eight,) = spec_facts(spec.with_format(WeightFormat.of("float-quantized"))).schemes
    assert (eight.format, eight.type, eight.act_bits, eight.act_dynamic) == ("float-quantized", "float", 8, True)
