"""Each engine's line is for what it can read, and says what becomes of an INT8 cache there."""

import yaml

from pipeline.layout import WeightFormat
from pipeline.serving import serving_lines, serving_yaml
from pipeline.spec import ModelSpec
from tests.toys import CONFIG

DENSE = ModelSpec.from_config({**CONFIG, "hidden_size": 64, "intermediate_size": 128})


def packed(num_bits: int, group_size: int = 32) -> ModelSpec:
    return DENSE.with_format(WeightFormat(num_bits=num_bits, group_size=group_size), ("lm_head",))


def commands(spec: ModelSpec) -> dict[str, str]:
    return {line.engine: line.command for line in serving_lines(spec)}


def test_a_16_bit_cache_needs_no_flag() -> None:
    assert commands(DENSE) == {
        "vllm": "vllm serve {model}",
        "lmdeploy": "lmdeploy serve api_server {model}",
        "llama.cpp": "llama-server -m model.gguf",
    }


def test_an_int8_cache_is_a_flag_of_every_engine() -> None:
    assert commands(DENSE.with_cache("per_token_head")) == {
        "vllm": "vllm serve {model} --kv-cache-dtype int8_per_token_head",
        "lmdeploy": "lmdeploy serve api_server {model} --quant-policy 8",
        "llama.cpp": "llama-server -m model.gguf -ctk q8_0 -ctv q8_0 -fa on",
    }


def test_an_engine_is_named_only_for_weights_it_has_kernels_for() -> None:
    assert [list(commands(packed(bits, size))) for bits, size in ((4, 32), (8, 32), (3, 32), (4, 16), (4, 8))] == [
        ["vllm", "lmdeploy", "llama.cpp"], ["vllm", "llama.cpp"], ["vllm", "llama.cpp"], ["vllm", "llama.cpp"], ["llama.cpp"],
    ]  # fmt: skip


def test_weights_that_one_kernel_alone_takes_are_noted() -> None:
    notes = {(bits, size): serving_lines(packed(bits, size))[0].note for bits, size in ((4, 32), (8, 64), (3, 32), (4, 16))}
    assert [size for size, note in notes.items() if "only Humming's multiply weights" in note] == [(3, 32), (4, 16)]


def test_calibrated_scales_are_not_promised_to_a_server() -> None:
    line = serving_lines(packed(4).with_cache("static"))[0]
    assert (line.engine, "read by llmpress alone" in line.note) == ("vllm", True)


def test_the_file_holds_what_was_measured_of_the_cache() -> None:
    measured = {"perplexity": 9.0, "kv_cache_perplexity_change_pct": 0.01, "kv_cache_kl_divergence": 1e-5}
    content = yaml.safe_load(serving_yaml(packed(4).with_cache("per_token_head"), "/models/small", measured))
    assert content["engines"]["vllm"]["command"] == "vllm serve /models/small --kv-cache-dtype int8_per_token_head"
    assert content["kv_cache"] == {
        "num_bits": 8, "mode": "per_token_head", "bytes_per_token": 2 * 2 * (32 + 4),
        "measured": {"kv_cache_perplexity_change_pct": 0.01, "kv_cache_kl_divergence": 1e-5},
    }  # fmt: skip
    assert "measured" not in yaml.safe_load(serving_yaml(DENSE, "m", {}))["kv_cache"]
