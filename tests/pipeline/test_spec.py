"""Shapes to bytes: known answers, and agreement with what libraries write (tests/stages holds every stage to it)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.architecture import Architecture
from pipeline.headers import TensorEntry
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec, ignored

MODELS = Path(__file__).parents[2] / "conf" / "model"
PARAMETERS = {  # as the hub counts the published files, less the `inv_freq` that those of Llama 2 carry
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_72b": 72_706_203_648,
    "smollm2_135m": 134_515_008,
}

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
    assert large.with_cache("per_token_head").kv_cache.bytes_per_token == 168_960  # 128 INT8 values and an fp32 scale to each vector
    assert large.with_cache("static").kv_cache.bytes_per_token == 163_840


def published(name: str) -> dict[str, Any]:
    content = yaml.safe_load((MODELS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert content["id"].count("/") == 1
    architecture: dict[str, Any] = content["architecture"]
    return architecture


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_every_known_model_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    spec = ModelSpec.from_config(published(name))
    assert spec.num_parameters == parameters
    assert spec.nbytes == 2 * parameters


def test_every_architecture_that_can_be_chosen_has_a_known_answer() -> None:
    assert {file.stem for file in MODELS.glob("*.yaml")} == {*PARAMETERS, "small"}


@pytest.mark.parametrize("name", sorted(set(PARAMETERS) - {"mixtral_8x7b"}))
def test_a_known_model_has_the_tensors_that_transformers_gives_it(name: str) -> None:
    config = published(name) | {"num_hidden_layers": 2}
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(made).state_dict()
    expected = ModelSpec.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key != "lm_head.weight" or not made.tie_word_embeddings}
    assert shapes == {key: shape for key, (_, shape) in expected.tensors().items()}
    assert made.max_position_embeddings == expected.architecture.max_position


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


def test_differences_name_what_is_missing_unexpected_and_misshapen() -> None:
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
