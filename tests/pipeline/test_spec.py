"""Shapes to bytes: known answers, and agreement with what libraries write (tests/stages holds every stage to it)."""

import re

import pytest

from pipeline.layout import WeightFormat
from pipeline.spec import Architecture, ModelSpec, ignored

LLAMA_8B = {
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def packed(num_bits: int, group_size: int, symmetric: bool) -> WeightFormat:
    return WeightFormat(num_bits=num_bits, group_size=group_size, symmetric=symmetric)


def test_known_sizes_of_llama_3() -> None:
    assert ModelSpec.from_config(LLAMA_8B).nbytes == 16_060_522_496
    assert ModelSpec.from_config(LLAMA_1B).nbytes == 2_471_628_800
    large = ModelSpec.from_config(LLAMA_70B)
    assert large.num_parameters == 70_553_706_496
    assert large.nbytes == 141_107_412_992
    assert large.with_format(packed(4, 128, True), ("lm_head",)).nbytes == pytest.approx(39.5e9, rel=0.002)
    assert large.with_format(packed(4, 128, False), ("lm_head",)).nbytes == pytest.approx(39.8e9, rel=0.002)
    assert large.kv_cache.bytes_per_token == 327_680


def test_a_packed_linear_layer_is_its_words_scales_and_shape() -> None:
    table = packed(4, 128, True).tensors((14336, 4096), "BF16")
    assert table == {
        "weight_packed": ("I32", (14336, 512)),
        "weight_scale": ("BF16", (14336, 32)),
        "weight_shape": ("I64", (2,)),
    }
    group = next(g for g in ModelSpec.from_config(LLAMA_8B).groups if g.name.endswith("gate_proj"))
    one = group.model_copy(update={"layers": (0,), "format": packed(4, 128, True)})
    spec = ModelSpec.from_config(LLAMA_8B).model_copy(update={"groups": (one,)})
    assert spec.nbytes == 30_277_648


def test_three_bits_are_packed_without_padding() -> None:
    assert packed(3, 64, False).tensors((256, 512), "F16")["weight_packed"] == ("I32", (256, 48))
    assert packed(3, 64, False).tensors((256, 512), "F16")["weight_zero_point"] == ("I32", (24, 8))


def test_a_group_size_that_does_not_divide_names_every_layer() -> None:
    spec = ModelSpec.from_config(LLAMA_8B | {"intermediate_size": 14400})
    with pytest.raises(
        ValueError, match=r"group_size: 128 does not divide the columns of model\.layers\.\*\.mlp\.down_proj \(14400\); 64 divides"
    ):
        spec.with_format(packed(4, 128, True))


def test_ignoring_one_layer_splits_its_group() -> None:
    spec = ModelSpec.from_config(LLAMA_8B).with_format(packed(4, 128, True), ("re:model.layers.0[.]", "lm_head"))
    tensors = spec.tensors()
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert "model.layers.1.mlp.up_proj.weight_packed" in tensors
    assert len(tensors) == len(set(tensors))
    assert spec.dense() == ModelSpec.from_config(LLAMA_8B)


def test_ignore_patterns_match_from_the_start_as_compressed_tensors_does() -> None:
    assert ignored("lm_head", ("re:lm",))
    assert not ignored("model.lm_head", ("re:lm_head", "lm_head"))


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
    assert ModelSpec.from_config(quantized()) == ModelSpec.from_config(LLAMA_8B).with_format(packed(4, 128, True), ("lm_head",))


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
        (quantized(WEIGHTS | {"strategy": "channel", "group_size": -1}), "weights are int by channel; only int by group is read"),
        (quantized(ignore=["re:("]), "ignore: 're:(' is not a regular expression (missing )"),
        (quantized(ignore=[5]), "quantization_config.ignore.0 is 5; input should be a valid string"),
    ],
)
def test_a_quantization_config_that_makes_no_sense_is_refused_by_field(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelSpec.from_config(config)


def test_differences_name_what_is_missing_unexpected_and_misshapen() -> None:
    from pathlib import Path

    from pipeline.headers import TensorEntry

    architecture = Architecture.from_config(LLAMA_1B | {"num_hidden_layers": 1})
    spec = ModelSpec.of(architecture)
    table = {name: TensorEntry(dtype, shape, Path("x"), 0) for name, (dtype, shape) in spec.tensors().items()}
    assert spec.differences(table) == []
    table["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorEntry("F32", (32,), Path("x"), 0)
    assert spec.differences(table) == []
    del table["model.norm.weight"]
    table["extra"] = TensorEntry("F32", (1,), Path("x"), 0)
    table["model.embed_tokens.weight"] = TensorEntry("F32", (128256, 2048), Path("x"), 0)
    assert spec.differences(table) == [
        "model.norm.weight is missing",
        "extra is unexpected",
        "model.embed_tokens.weight is F32 [128256, 2048], expected BF16 [128256, 2048]",
    ]
