"""The writer of GGUF files, and the plan of what is in them. Needs the package `gguf` and no llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.artifact import DenseCheckpoint, Export
from pipeline.errors import InputProblems
from pipeline.gguf_file import read_gguf
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.gguf import GGUF
from stages.runtime.gguf_check import check_file
from stages.runtime.gguf_mix import fallbacks, gguf_spec, unquantized
from stages.runtime.gguf_names import gguf_name
from stages.runtime.gguf_tokenizer import LLAMA3, QWEN2, TokenizerKind, tokenizer_kind
from stages.runtime.gguf_writer import permuted, rope_divisors, write_gguf
from stages.runtime.tensors import TensorReader
from tests.stages.models import make_checkpoint

SMALL_MODEL = Path(__file__).parents[2] / "assets" / "small-llama"
LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama", "dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3"},
}  # fmt: skip
SMALL = {**LLAMA3_8B, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "rope_scaling": None}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 128}


def f16(model: DenseCheckpoint, folder: Path) -> Export:
    folder.mkdir()
    return GGUF.from_dict({"format": "F16"}).run(Context(folder, lambda event: None), model)


def dense(folder: Path, **settings: Any) -> DenseCheckpoint:
    make_checkpoint(folder, **settings)
    return DenseCheckpoint(folder, DenseCheckpoint(folder).model_spec)


def contents(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """By name, as the package of llama.cpp reads them."""
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}])
def test_every_weight_is_the_source_in_16_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    model = dense(tmp_path / "model", **settings)
    found, reader = contents(f16(model, tmp_path / "made").file), TensorReader(model.path)
    assert set(found) == {gguf_name(name) for name in reader.table}
    heads = {".q_proj.": 4, ".k_proj.": 2}
    for name in reader.table:
        expected = reader.read(name)
        for part, count in heads.items():
            expected = interleaved(expected, count) if part in name else expected
        stored = found[gguf_name(name)]
        assert stored.dtype == (np.float16 if expected.ndim == 2 else np.float32)
        np.testing.assert_array_equal(stored, expected.to(torch.float16 if expected.ndim == 2 else torch.float32).numpy())


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: of each head, those of its first half at even places, those of its second at odd ones."""
    width = len(weight) // heads
    return torch.stack([weight[head * width + (i // 2) + (i % 2) * (width // 2)] for head in range(heads) for i in range(width)])


def test_reordered_rows_rotate_in_pairs_as_halves_did() -> None:
    q, k, angles = torch.randn(8), torch.randn(8), torch.rand(4)

    def by_halves(x: torch.Tensor, position: int) -> torch.Tensor:
        c, s, (a, b) = (position * angles).cos(), (position * angles).sin(), x.chunk(2)
        return torch.cat([a * c - b * s, b * c + a * s])

    def by_pairs(x: torch.Tensor, position: int) -> torch.Tensor:
        c, s, a, b = (position * angles).cos(), (position * angles).sin(), x[0::2], x[1::2]
        return torch.stack([a * c - b * s, b * c + a * s], 1).flatten()

    expected = by_halves(q, 5) @ by_halves(k, 2)
    torch.testing.assert_close(by_pairs(permuted(q, 1), 5) @ by_pairs(permuted(k, 1), 2), expected)


def test_the_header_says_what_the_config_and_the_tokenizer_say(tmp_path: Path) -> None:
    model = DenseCheckpoint(SMALL_MODEL, DenseCheckpoint(SMALL_MODEL).model_spec)
    said, tokenizer = read_gguf(f16(model, tmp_path / "made").file).metadata, AutoTokenizer.from_pretrained(SMALL_MODEL)
    assert said["general.architecture"] == "llama" and said["llama.context_length"] == 512
    assert (said["llama.attention.head_count"], said["llama.attention.head_count_kv"], said["llama.attention.key_length"]) == (8, 4, 64)
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5) and said["llama.rope.freq_base"] == 1e4
    assert said["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(4096))
    assert said["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * 4093  # control tokens first
    assert said["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id and said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(said["tokenizer.ggml.merges"]) == len(json.loads((SMALL_MODEL / "tokenizer.json").read_text())["model"]["merges"])


def test_what_is_quantized_is_the_checkpoint_itself(tmp_path: Path) -> None:
    model, file = dense(tmp_path / "model"), tmp_path / "own.gguf"
    spec = unquantized(model.model_spec)
    write_gguf(model, spec, file, lambda done, total: None)
    check_file(file, spec)
    stored = contents(file)["blk.1.ffn_down.weight"].view(np.uint16).reshape(64, 96)
    np.testing.assert_array_equal(stored, TensorReader(model.path).read("model.layers.1.mlp.down_proj.weight").view(torch.uint16).numpy())


def test_ids_that_the_tokenizer_lacks_are_filled_in(tmp_path: Path) -> None:
    model = dense(tmp_path / "model", vocab_size=307)
    config = json.loads((model.path / "config.json").read_text())
    larger = make_checkpoint(tmp_path / "larger", vocab_size=310)
    (larger / "tokenizer.json").write_bytes((model.path / "tokenizer.json").read_bytes())
    assert config["vocab_size"] == 307
    said = read_gguf(f16(DenseCheckpoint(larger, DenseCheckpoint(larger).model_spec), tmp_path / "made").file).metadata
    assert said["tokenizer.ggml.tokens"][-3:] == ["[PAD307]", "[PAD308]", "[PAD309]"] and said["tokenizer.ggml.token_type"][-3:] == [5] * 3


def test_rotary_divisors_are_transformers_own() -> None:
    plain = AutoConfig.for_model(
        "llama", hidden_size=256, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    scaled = AutoConfig.for_model("llama", hidden_size=256, num_attention_heads=4, rope_parameters=ROPE)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    exponents = torch.arange(0, 64, 2) / plain.head_dim
    torch.testing.assert_close(rope_divisors(ROPE, 64), 1 / 5e5**exponents / inverse)


def test_bits_for_each_weight_are_those_that_llama_cpp_publishes() -> None:
    """Llama 3.1 8B, in tools/quantize/README.md of llama.cpp; and its size of the 70B model in Q4_K_M."""
    model = ModelSpec.from_config(LLAMA3_8B)
    found = {form: round(gguf_spec(model, form).bits_per_weight, 4) for form in ("F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")}
    assert found == {"F16": 16.0005, "Q8_0": 8.5008, "Q5_K_M": 5.7036, "Q4_K_M": 4.8944, "Q2_K": 3.1593}


def test_rows_that_fill_no_blocks_are_named_with_what_they_fall_back_to() -> None:
    model = ModelSpec.from_config(SMALL)
    said = fallbacks(model, "Q4_K_M")
    assert any(
        s.startswith("rows of 96 are no multiple of 256") and "model.layers.*.mlp.down_proj fall back from Q6_K to Q8_0" in s for s in said
    )
    assert any("rows of 64" in s and "self_attn.q_proj" in s and s.endswith("fall back from Q4_K to Q5_0") for s in said)
    assert any(
        "lm_head" in s and s.endswith("from Q8_0 to F16") for s in fallbacks(ModelSpec.from_config(SMALL | {"hidden_size": 72}), "Q4_K_M")
    )
    assert fallbacks(ModelSpec.from_config(LLAMA3_8B), "Q2_K") == [] and fallbacks(model, "F16") == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
            "model: mixtral is not written to GGUF; there are: llama",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "model: rope type dynamic is not written to GGUF"),
        ({"model_type": "qwen2", "head_dim": 32}, "model: llama.cpp takes the heads of qwen2 to be as wide as the model"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputProblems) as refused:
        GGUF.from_dict({}).infer(ModelSpec.from_config(SMALL | changes))
    assert any(problem.startswith(told) for problem in refused.value.problems)


def test_a_cache_that_llama_cpp_cannot_have_is_refused() -> None:
    model = ModelSpec.from_config(SMALL)  # heads of 16
    for mode, told in (("static", "no calibrated INT8 scales"), ("per_token_head", "heads of a multiple of 32")):
        with pytest.raises(InputProblems, match=told):
            GGUF.from_dict({}).infer(model.with_cache(mode))  # type: ignore[arg-type]
    wide = ModelSpec.from_config(SMALL | {"head_dim": 32}).with_cache("per_token_head")
    assert GGUF.from_dict({}).infer(wide).kv_cache.bytes_per_token == 2 * 2 * 2 * 34


def test_threads_of_a_format_that_is_not_quantized_are_refused() -> None:
    with pytest.raises(InputProblems, match="F16 is not quantized"):
        GGUF.from_dict({"format": "F16"}, {"threads": 2}).infer(ModelSpec.from_config(SMALL))


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((SMALL_MODEL / "tokenizer.json").read_text())
    return content | changes


def split(expression: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def test_pre_tokenizers_are_told_by_what_they_do() -> None:
    merging = tokenizer_json()["model"]
    whole_words = merging | {"ignore_merges": True}
    known = [(split(LLAMA3), whole_words, "llama-bpe"), (split(LLAMA3), merging, "dbrx"), (split(QWEN2), merging, "qwen2")]
    known += [(BYTE_LEVEL, merging, "gpt-2"), (DIGITS, merging, "smollm")]
    for pre_tokenizer, model, name in known:
        assert tokenizer_kind(tokenizer_json(pre_tokenizer=pre_tokenizer, model=model)) == TokenizerKind("gpt2", name)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"pre_tokenizer": split(r"\w+|\W+")},
            r"its pre-tokenizer \(\\w\+\|\\W\+, without ignore_merges\) is none that llama.cpp is known",
        ),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, r"its pre-tokenizer \(ByteLevel, add_prefix_space=True"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": False}}, r"its pre-tokenizer \(Digits, individual_digits=False"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"its pre-tokenizer \(Whitespace"),
        ({"pre_tokenizer": split(QWEN2), "model": {"type": "BPE", "ignore_merges": True}}, "with ignore_merges"),
        ({"normalizer": {"type": "Lowercase"}}, r"normalizes text \(Lowercase\)"),
        ({"model": {"type": "Unigram"}}, "of type Unigram, and only BPE"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}}, "no token for each of them"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tokenizer_kind(tokenizer_json(**changes))


def test_a_plan_refuses_what_stands_in_the_files(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    assert GGUF.from_dict({}).refusals(folder) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "partial_rotary_factor": 0.5}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(pre_tokenizer=split(r"\d"))))
    said = GGUF.from_dict({}).refusals(folder)
    assert len(said) == 3 and all(sentence.startswith("model: ") for sentence in said)


def test_a_weight_beyond_f16_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    model = dense(tmp_path / "model")
    weights = safetensors.torch.load_file(model.path / "model.safetensors")
    weights["lm_head.weight"][3, 3] = 1e6
    safetensors.torch.save_file(weights, model.path / "model.safetensors")
    with pytest.raises(ValueError, match=r"format: lm_head\.weight holds a weight beyond 65504, the largest of F16; write format: Q8_0"):
        f16(model, tmp_path / "made")


def test_a_file_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    made = f16(model, tmp_path / "made")
    with pytest.raises(
        ValueError, match=r"not what was planned: blk\.0\.attn_k\.weight is \('F16', \(32, 64\)\), expected \('Q5_0', \(32, 64\)\)"
    ):
        check_file(made.file, gguf_spec(model.model_spec, "Q4_K_M"))


def test_a_window_that_slides_ends_the_positions(tmp_path: Path) -> None:
    model, notes = dense(tmp_path / "model", model_type="mistral", sliding_window=128), []
    (tmp_path / "made").mkdir()
    made = GGUF.from_dict({"format": "F16"}).run(Context(tmp_path / "made", notes.append), model)
    assert read_gguf(made.file).metadata["llama.context_length"] == 128
    assert any("the file says 128 positions" in note["text"] for note in notes if note["event"] == "note")


def test_memory_is_one_tensor_and_disk_is_exact() -> None:
    model, host = ModelSpec.from_config(LLAMA3_8B), Target.host()
    need = GGUF.from_dict({"format": "Q4_K_M"}).memory(model, host)
    assert need.totals["ram"] == 3 * 2 * 128256 * 4096 and need.disk["export"] == 4_912_898_304
    assert need.totals["disk"] == 4_912_898_304 + gguf_spec(model, "F16").nbytes
    assert GGUF.from_dict({"format": "F16"}).memory(model, host).totals["disk"] == gguf_spec(model, "F16").nbytes
