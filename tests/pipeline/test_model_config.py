"""What a config.json may say: transformers' defaults where it is silent, one sentence where it makes no sense."""

import re
from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.architecture import Architecture
from pipeline.layout import WeightFormat
from pipeline.model_config import CONFIGS
from pipeline.spec import ModelSpec
from tests.pipeline.test_spec import LLAMA_8B

MIXTRAL = LLAMA_8B | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA_8B | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    optional = {"num_key_value_heads", "max_position_embeddings", "dtype"}
    config = {key: value for key, value in (QWEN3_MOE | MIXTRAL).items() if key not in optional} | {"model_type": model_type}
    theirs, ours = AutoConfig.for_model(**config), Architecture.from_config(config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.dtype == "F32"


def test_kv_heads_of_null_are_one_for_each_query_head() -> None:
    config = LLAMA_8B | {"model_type": "qwen2", "num_attention_heads": 64, "num_key_value_heads": None}
    assert Architecture.from_config(config).num_kv_heads == AutoConfig.for_model(**config).num_key_value_heads == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported; did you mean 'llama'?"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"vocab_size": None}, "config.json: vocab_size is None; input should be a valid integer"),
        ({"vocab_size": 0}, "config.json: vocab_size is 0; input should be greater than or equal to 1"),
        ({"vocab_size": True}, "config.json: vocab_size is True; input should be a valid integer"),
        ({"hidden_size": 10**30}, "; input should be less than or equal to 16777216"),
        ({"num_hidden_layers": 100_000}, "config.json: num_hidden_layers is 100000; input should be less than or equal to 1000"),
        ({"num_attention_heads": 8192}, "config.json: a hidden_size of 4096 is not enough for 8192 query heads"),
        ({"num_key_value_heads": "2"}, "config.json: num_key_value_heads is '2'; input should be a valid integer"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads is 0; input should be greater than or equal to 1"),
        ({"head_dim": "abc"}, "config.json: head_dim is 'abc'; input should be a valid integer"),
        ({"head_dim": -64}, "config.json: head_dim is -64; input should be"),
        ({"max_position_embeddings": "8k"}, "config.json: max_position_embeddings is '8k'; input should be a valid integer"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings is 'no'; input should be a valid boolean"),
        ({"dtype": ["bfloat16"]}, "config.json: dtype is ['bfloat16']; input should be a valid string"),
        ({"quantization_config": "x"}, "config.json: quantization_config is 'x'; input should be an object"),
        ({"quantization_config": {}}, "quantized as None/None"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 KV heads evenly"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized as awq/None"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ModelSpec.from_config(LLAMA_8B | change)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"^config\.json: hidden_size is missing$"):
        ModelSpec.from_config({name: value for name, value in LLAMA_8B.items() if name != "hidden_size"})


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def quantized(weights: object = WEIGHTS, **changes: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    content = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    return LLAMA_8B | {"quantization_config": content | changes}


def test_a_packed_checkpoint_s_config_gives_its_spec() -> None:
    form = WeightFormat(num_bits=4, group_size=128)
    assert ModelSpec.from_config(quantized()) == ModelSpec.from_config(LLAMA_8B).with_format(form, ("lm_head",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (quantized(config_groups=None), "config.json: quantization_config.config_groups is None; input should be an object"),
        (quantized(config_groups={}), "the checkpoint mixes quantization schemes"),
        (quantized(config_groups={"g": 5}), "config.json: quantization_config.config_groups.g is 5; input should be an object"),
        (quantized("x"), "quantization_config.config_groups.group_0.weights is 'x'; input should be an object"),
        (quantized({}), "quantization_config.config_groups.group_0.weights.num_bits is missing"),
        (quantized(WEIGHTS | {"num_bits": 400}), "weights.num_bits is 400; input should be less than or equal to 8"),
        (quantized(WEIGHTS | {"group_size": 0}), "group_size is 0; groups need at least one column"),
        (quantized(WEIGHTS | {"group_size": None}), "group_size is None; groups need at least one column"),
        (quantized(WEIGHTS | {"group_size": "128"}), "weights.group_size is '128'; input should be a valid integer"),
        (quantized(WEIGHTS | {"strategy": "tensor"}), "weights are int by tensor; only int by group or channel is read"),
        (quantized(ignore=["re:("]), "ignore: 're:(' is not a regular expression (missing )"),
        (quantized(ignore=[5]), "quantization_config.ignore.0 is 5; input should be a valid string"),
    ],
)
def test_a_quantization_config_that_makes_no_sense_is_refused_by_field(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MIXTRAL | {"num_local_experts": None}, "config.json: num_local_experts is None; input should be a valid integer"),
        (MIXTRAL | {"num_local_experts": 0}, "config.json: num_local_experts is 0; input should be greater than or equal to 1"),
        (MIXTRAL | {"num_local_experts": 10**6}, "config.json: num_local_experts is 1000000; input should be less than or equal to 1024"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "config.json: num_experts_per_tok is 9, more than the 8 experts that there are"),
        (MIXTRAL | {"num_experts_per_tok": True}, "config.json: num_experts_per_tok is True; input should be a valid integer"),
        (QWEN3_MOE | {"num_experts": "128"}, "config.json: num_experts is '128'; input should be a valid integer"),
        (QWEN3_MOE | {"moe_intermediate_size": 0}, "config.json: moe_intermediate_size is 0; input should be greater than or equal to 1"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "config.json: decoder_sparse_step is 0; input should be greater than or equal to 1"),
        (QWEN3_MOE | {"decoder_sparse_step": 33}, "decoder_sparse_step and mlp_only_layers leave no layer with experts; write"),
        (QWEN3_MOE | {"mlp_only_layers": "0"}, "config.json: mlp_only_layers is '0'; input should be a valid list"),
        (QWEN3_MOE | {"mlp_only_layers": [-1]}, "config.json: mlp_only_layers.0 is -1; input should be greater than or equal to 0"),
        (QWEN3_MOE | {"mlp_only_layers": [3, 32]}, "config.json: mlp_only_layers names layer 32, and there are 32, counted from 0"),
        (QWEN3_MOE | {"model_type": "qwen3moe"}, "model_type 'qwen3moe' is not supported; did you mean 'qwen3_moe'?"),
    ],
)  # fmt: skip
def test_experts_that_make_no_sense_are_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        ModelSpec.from_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["num_experts_per_tok", "moe_intermediate_size"])
def test_a_field_of_the_experts_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: {field} is missing$"):
        ModelSpec.from_config({name: value for name, value in QWEN3_MOE.items() if name != field})


def test_the_number_of_experts_has_two_names_and_no_default() -> None:
    saved = {("num_local_experts" if name == "num_experts" else name): value for name, value in QWEN3_MOE.items()}
    assert ModelSpec.from_config(saved) == ModelSpec.from_config(QWEN3_MOE)
    with pytest.raises(ValueError, match=r"^config\.json: num_local_experts is missing$"):
        ModelSpec.from_config({name: value for name, value in MIXTRAL.items() if name != "num_local_experts"})
