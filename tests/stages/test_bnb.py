"""bitsandbytes: what is written is what the library itself makes, and every way to run it computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.bitsandbytes_layout import state_json
from pipeline.headers import tensor_table
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.bnb import BitsAndBytes
from stages.dequantize import Dequantize
from stages.evaluate import Evaluate
from stages.runtime import bitsandbytes_weights, packing
from stages.runtime.guard import check_checkpoint, layerwise_losses
from stages.runtime.loading import load_model
from stages.runtime.scoring import token_losses
from tests.stages.models import make_checkpoint, write_documents

WHOLE_BLOCKS = {"intermediate_size": 128}  # of 64 columns, which bitsandbytes' kernel for CPUs needs
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-double": {"double_quant": True},
    "fp4": {"format": "fp4"},
    "fp4-double": {"format": "fp4", "double_quant": True},
    "int8": {"format": "int8"},
}
IDS = torch.arange(120).view(2, 60)


def quantize(source: Path, output: Path, **params: object) -> QuantizedCheckpoint:
    return BitsAndBytes.from_dict(params).run(Context(output, lambda event: None), DenseCheckpoint(source))


def by_transformers(source: Path, output: Path, **params: Any) -> Path:
    """The same by transformers, which quantizes while it loads."""
    form = params.get("format", "nf4")
    if form == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    else:
        double = params.get("double_quant", False)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=form, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto", device_map={"": "cpu"})
    model.save_pretrained(output)
    return output


@pytest.mark.parametrize("params", FORMATS.values(), ids=FORMATS)
def test_it_writes_what_transformers_would_save_but_for_the_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 64 * 32)
    monkeypatch.setattr(bitsandbytes_weights, "BLOCK_WEIGHTS", 64 * 40)  # a weight in several blocks, of which one is short
    source = make_checkpoint(tmp_path / "source", attention_bias=True, num_hidden_layers=2)
    ours = load_file(quantize(source, tmp_path / "ours", **params).path / "model.safetensors")
    theirs = load_file(by_transformers(source, tmp_path / "theirs", **params) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist())), name
        else:
            assert torch.equal(ours[name], tensor), name
    said, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert said["quantization_config"] == expected["quantization_config"]


@pytest.mark.parametrize("params", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"shard_size": "40KB", "model_type": "mistral", "dtype": torch.float16},
        {"model_type": "qwen2", "vocab_size": 401, "dtype": torch.float32},
        {"model_type": "qwen3", "head_dim": 32},
    ],
    ids=str,
)
def test_the_inferred_spec_is_what_stands_on_disk(tmp_path: Path, config: dict[str, Any], params: dict[str, Any]) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, **config)
    params = params | {"ignore": ["lm_head", "re:.*layers.1.mlp.*"]}
    inferred = BitsAndBytes.from_dict(params).infer(DenseCheckpoint(source).model_spec)
    made = quantize(source, tmp_path / "out", **params)
    table = tensor_table(made.path)
    assert {name: (entry.dtype, entry.shape) for name, entry in table.items()} == inferred.tensors()
    assert sum(entry.nbytes for entry in table.values()) == inferred.nbytes
    check_checkpoint(made.path, inferred)
    assert ModelSpec.from_config(made.config) == inferred


@pytest.mark.parametrize("params", [*FORMATS.values(), {"format": "int8", "llm_int8_threshold": 1.5}], ids=str)
def test_stock_transformers_a_resident_and_a_swept_model_compute_the_same(tmp_path: Path, params: dict[str, Any]) -> None:
    source = make_checkpoint(tmp_path / "source", model_type="qwen2", **WHOLE_BLOCKS)
    made = quantize(source, tmp_path / "out", **params, ignore=["lm_head", "re:.*layers.1.mlp.*"])
    stock, report = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    kind = Linear8bitLt if params.get("format") == "int8" else Linear4bit
    assert sum(isinstance(module, kind) for module in stock.modules()) == 7 * 3 - 3
    for module in stock.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel sums in another order
    resident, swept = token_losses(load_model(made.path), IDS), layerwise_losses(made.path, IDS)
    assert torch.equal(token_losses(stock, IDS), resident)
    torch.testing.assert_close(swept, resident, rtol=0, atol=2e-6)
    assert (resident - token_losses(load_model(source), IDS)).abs().mean() > 1e-3  # it did round


def test_inputs_that_reach_the_threshold_stay_as_they_are(tmp_path: Path) -> None:
    """With a threshold below every input nothing of the inputs is rounded, so that the dequantized weights compute the same."""
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    losses = {}
    for threshold in (1e-6, 6.0, 0.0):
        made = quantize(source, tmp_path / str(threshold), format="int8", llm_int8_threshold=threshold)
        losses[threshold] = layerwise_losses(made.path, IDS)
    dense = Dequantize().run(Context(tmp_path / "dense", lambda event: None), made)
    weights_alone = token_losses(load_model(dense.path), IDS)
    torch.testing.assert_close(losses[1e-6], weights_alone, rtol=0, atol=1e-4)
    for threshold in (6.0, 0.0):
        assert (losses[threshold] - weights_alone).abs().mean() > 1e-3


@pytest.mark.parametrize("params", [FORMATS["nf4-double"], FORMATS["fp4"]], ids=str)
def test_dequantized_four_bit_weights_compute_what_the_packed_ones_did(tmp_path: Path, params: dict[str, Any]) -> None:
    made = quantize(make_checkpoint(tmp_path / "source", tie_word_embeddings=True), tmp_path / "out", **params)
    dense = Dequantize().run(Context(tmp_path / "dense", lambda event: None), made)
    check_checkpoint(dense.path, made.model_spec.dense())
    assert "quantization_config" not in dense.config
    assert torch.equal(token_losses(load_model(dense.path), IDS), token_losses(load_model(made.path), IDS))


def test_a_model_kept_as_stored_has_four_bit_layers_and_their_memory(tmp_path: Path) -> None:
    made = quantize(make_checkpoint(tmp_path / "source", dtype=torch.float32), tmp_path / "out")  # rows of 96 are no whole blocks
    kept, unpacked = load_model(made.path, as_stored=True), load_model(made.path)
    assert isinstance(kept.model.layers[0].mlp.down_proj, Linear4bit)
    assert not any(isinstance(module, Linear4bit) for module in unpacked.modules())
    assert sum(p.nbytes for p in kept.parameters()) < 0.5 * sum(p.nbytes for p in unpacked.parameters())
    assert (token_losses(kept, IDS) - token_losses(unpacked, IDS)).abs().mean() < 0.05  # by a kernel that computes in bf16


@pytest.mark.parametrize("params", [FORMATS["nf4"], FORMATS["int8"]], ids=str)
def test_evaluate_scores_it_resident_and_layer_by_layer(tmp_path: Path, params: dict[str, Any]) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2))
    made, text = quantize(source.path, tmp_path / "out", **params), Dataset(write_documents(tmp_path / "eval.jsonl", count=6))
    found = {}
    for mode in ("resident", "layerwise"):
        stage = Evaluate.from_dict({"max_length": 32}, {"mode": mode, "batch_size": 2})
        found[mode] = stage.run(Context(tmp_path / mode, lambda event: None), made, text, source).metrics
    assert found["resident"] == pytest.approx(found["layerwise"], abs=1e-4)
    assert found["resident"]["kl_divergence"] > 0
    assert found["resident"]["nbytes"] == made.model_spec.nbytes


def test_nested_scales_are_padded_to_a_length_that_no_offset_changes() -> None:
    lengths = {
        len(state_json("nf4", True, (64, 96), "BF16", offset))
        for offset in (0.0, 1.0, 0.39459228515625, 2.2250738585072014e-308, 1e300 / 3)
    }
    assert len(lengths) == 1
    assert json.loads(state_json("nf4", True, (64, 96), "BF16", 0.39459228515625))["nested_offset"] == 0.39459228515625


def test_a_checkpoint_of_bitsandbytes_own_is_read_as_well(tmp_path: Path) -> None:
    theirs = by_transformers(make_checkpoint(tmp_path / "source", num_hidden_layers=1), tmp_path / "theirs", double_quant=True)
    checkpoint = QuantizedCheckpoint(theirs)
    assert checkpoint.model_spec.differences(tensor_table(theirs)) == []
    assert checkpoint.model_spec.linear_groups[0].format.layout == "nf4"
    torch.testing.assert_close(layerwise_losses(theirs, IDS), token_losses(load_model(theirs), IDS), rtol=0, atol=2e-6)


def test_the_shape_beside_a_weight_is_held_to_the_spec(tmp_path: Path) -> None:
    made = quantize(make_checkpoint(tmp_path / "source", num_hidden_layers=1), tmp_path / "out")
    file = made.path / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"shape": [64, 96]}') == 1
    file.write_bytes(content.replace(b'"shape": [64, 96]}', b'"shape": [96, 64]}'))
    with pytest.raises(ValueError, match=r"down_proj\.weight\.quant_state\.bitsandbytes__nf4 holds \[96, 64\], expected \[64, 96\]"):
        check_checkpoint(made.path, made.model_spec)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"format": "int8", "double_quant": True}, "double_quant: int8 has one scale for each row"),
        ({"llm_int8_threshold": 4.0}, "llm_int8_threshold: nf4 does not round inputs; leave it out or write format: int8"),
        ({"format": "nf8"}, "Input should be 'nf4', 'fp4' or 'int8'"),
        ({"format": "int8", "llm_int8_threshold": -1.0}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BitsAndBytes.from_dict(params)


def test_what_cannot_be_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    with pytest.raises(ValueError, match="ignore: as llm_int8 lm_head would round the hidden states that it reads"):
        BitsAndBytes.from_dict({"format": "int8", "ignore": []}).infer(spec)
    with pytest.raises(ValueError, match=r"ignore: 'lm_heat' matches no Linear layer; did you mean 'lm_head'\?"):
        BitsAndBytes.from_dict({"ignore": ["lm_heat"]}).infer(spec)
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sparse = DenseCheckpoint(make_checkpoint(tmp_path / "experts", num_hidden_layers=1, **experts)).model_spec
    with pytest.raises(ValueError, match="mixtral has experts, which transformers holds in one tensor for each layer"):
        BitsAndBytes().infer(sparse)


def test_memory_grows_with_the_largest_weight_and_not_with_the_model(tmp_path: Path) -> None:
    few, many = (DenseCheckpoint(make_checkpoint(tmp_path / str(n), num_hidden_layers=n)).model_spec for n in (1, 6))
    stage, target = BitsAndBytes(), Target(name="any")
    assert stage.memory(few, target).ram == stage.memory(many, target).ram
    assert stage.memory(many, target).totals["disk"] == stage.infer(many).nbytes
