"""INT8 and FP8: llm-compressor's own numbers, streamed; inputs are rounded wherever the model runs; smoothing folds into the norms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import tensor_table
from pipeline.identity import stage_key
from pipeline.stage import Context, Stage, find_stage
from pipeline.target import Target
from stages.dequantize import Dequantize
from stages.evaluate import Evaluate
from stages.fp8 import FP8
from stages.int8 import Int8
from stages.runtime import packing
from stages.runtime.guard import check_checkpoint, layerwise_losses
from stages.runtime.loading import load_model
from stages.runtime.scoring import token_losses
from tests.stages.models import make_checkpoint, write_documents

DATA = DatasetSpec(split="calibration", digest="0", nbytes=100_000)
SMOOTH = {"smoothing_strength": 0.5, "num_samples": 8, "max_length": 64}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A8": ("int8", {}),
    "W8A16": ("int8", {"scheme": "W8A16"}),
    "FP8": ("fp8", {}),
    "smoothed": ("int8", SMOOTH),
}
ROUNDED = {name: STAGES[name] for name in ("W8A8", "W8A16", "FP8")}
IDS = torch.arange(120).view(2, 60)


def make(name: str, source: Path, output: Path, execution: dict[str, Any] | None = None, **params: object) -> QuantizedCheckpoint:
    stage, defaults = STAGES[name]
    made: Stage = find_stage(stage).from_dict(defaults | params, execution)
    inputs = {"calibration": Dataset(write_documents(output.parent / "calibration.jsonl"))} if name == "smoothed" else {}
    quantized: QuantizedCheckpoint = made.run(Context(output, lambda event: None), model=DenseCheckpoint(source), **inputs)
    return quantized


@pytest.mark.parametrize(("name", "preset"), [("W8A8", "W8A8"), ("FP8", "FP8_DYNAMIC")])
def test_it_equals_llm_compressors_own_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, preset: str) -> None:
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 1)
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"])])
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    made = make(name, source, tmp_path / "ours")
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), load_file(made.path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].view(torch.uint8), ours[name].view(torch.uint8)) for name in theirs)
    assert made.config["quantization_config"] == json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"shard_size": "40KB", "model_type": "mistral", "dtype": torch.float16},
        {"model_type": "qwen2", "vocab_size": 401, "dtype": torch.float32},
    ],
    ids=str,
)
def test_the_inferred_spec_is_what_stands_on_disk(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, **config)
    params: dict[str, Any] = {"ignore": ["lm_head", "re:.*layers.1.mlp.*"]}
    stage = find_stage(STAGES[name][0]).from_dict(STAGES[name][1] | params)
    inferred = stage.infer(DenseCheckpoint(source).model_spec, **({"calibration": DATA} if name == "smoothed" else {}))
    made = make(name, source, tmp_path / "out", **params)
    table = tensor_table(made.path)
    assert {name: (entry.dtype, entry.shape) for name, entry in table.items()} == inferred.tensors()
    assert sum(entry.nbytes for entry in table.values()) == inferred.nbytes
    check_checkpoint(made.path, inferred)


@pytest.mark.parametrize("name", ROUNDED)
def test_stock_transformers_a_resident_and_a_swept_model_compute_the_same(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", model_type="qwen2")
    made = make(name, source, tmp_path / "out", ignore=["lm_head", "re:.*layers.1.mlp.*"])
    stock, report = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        stock(IDS[:, :1])  # its weights are multiplied out in the first forward of the whole model
    resident, swept = token_losses(load_model(made.path), IDS), layerwise_losses(made.path, IDS)
    assert torch.equal(token_losses(stock, IDS), resident)
    torch.testing.assert_close(swept, resident, rtol=0, atol=2e-6)
    dense = Dequantize().run(Context(tmp_path / "dense", lambda event: None), made)
    weights_alone = (token_losses(load_model(dense.path), IDS) - resident).abs().mean()
    assert (weights_alone > 1e-3) == (name != "W8A16")  # dequantized, it rounds no inputs


@pytest.mark.parametrize("name", ["W8A8", "FP8"])
def test_evaluate_scores_it_resident_and_layer_by_layer(tmp_path: Path, name: str) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2))
    made, text = make(name, source.path, tmp_path / "out"), Dataset(write_documents(tmp_path / "eval.jsonl", count=6))
    found = {}
    for mode in ("resident", "layerwise"):
        stage = Evaluate.from_dict({"max_length": 32}, {"mode": mode, "batch_size": 2})
        found[mode] = stage.run(Context(tmp_path / mode, lambda event: None), made, text, source).metrics
    assert found["resident"] == pytest.approx(found["layerwise"], abs=1e-4)
    assert found["resident"]["kl_divergence"] > 0


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_smoothing_divides_the_norms_by_what_it_multiplies_the_weights_with(tmp_path: Path, offload: str) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, dtype=torch.float32)
    made = make("smoothed", source, tmp_path / "out", {"offload": offload})
    dense = load_file(source / "model.safetensors")
    quantized = load_file(made.path / "model.safetensors")
    for layer in range(2):
        for norm, linear in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
            prefix = f"model.layers.{layer}."
            divided = dense[f"{prefix}{norm}.weight"] / quantized[f"{prefix}{norm}.weight"]
            assert (divided - 1).abs().max() > 0.1
            name = f"{prefix}{linear}.weight"
            smoothed, scale = dense[name] * divided, quantized[f"{name}_scale"]
            torch.testing.assert_close(scale[:, 0], smoothed.abs().amax(1) / 127.5)  # scales are those of the smoothed weights
            assert ((quantized[name] * scale - smoothed).abs() <= scale * 0.5001).all()
    assert torch.equal(quantized["model.norm.weight"], dense["model.norm.weight"])


def test_smoothing_helps_where_an_input_channel_is_an_outlier(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if "layernorm" in name:
            weights[name][7] *= 60  # what SmoothQuant is for: one channel decides the scale of every token
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    text, reference = Dataset(write_documents(tmp_path / "eval.jsonl", count=8)), DenseCheckpoint(source)
    kl = {}
    for name in ("W8A8", "smoothed"):
        made = make(name, source, tmp_path / name)
        stage = Evaluate.from_dict({"max_length": 64})
        kl[name] = stage.run(Context(tmp_path / f"{name}-report", lambda event: None), made, text, reference).metrics["kl_divergence"]
    assert kl["smoothed"] < 0.8 * kl["W8A8"]


def test_calibration_is_wired_and_part_of_the_key_only_where_it_smooths() -> None:
    plain, smoothed = Int8(), Int8.from_dict({"smoothing_strength": 0.5})
    assert set(plain.inputs()) == {"model"} and set(smoothed.inputs()) == {"model", "calibration"}
    assert smoothed.params.model_dump()["num_samples"] == 128
    keys = [stage_key(stage, {"model": "m"}) for stage in (plain, Int8.from_dict({"scheme": "W8A8"}), smoothed)]
    assert keys[0] == keys[1] != keys[2]
    assert "llmcompressor" in smoothed.libraries and "llmcompressor" not in plain.libraries


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"scheme": "W8A16", "smoothing_strength": 0.5}, "smoothing_strength: W8A16 does not round inputs, so smoothing has no use"),
        ({"num_samples": 8}, "num_samples: without smoothing nothing is calibrated; leave it out or write smoothing_strength: 0.5"),
        ({"smoothing_strength": 1.0}, "less than 1"),
        ({"scheme": "W4A8"}, "Input should be 'W8A8' or 'W8A16'"),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Int8.from_dict(params)


def test_what_cannot_be_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    for stage in (FP8, Int8):
        with pytest.raises(ValueError, match=r"ignore: as (float|int)-quantized lm_head would round the hidden states"):
            stage.from_dict({"ignore": []}).infer(spec)
    with pytest.raises(ValueError, match="max_length: 512 is more than the model's 256 positions; write 256 or less"):
        Int8.from_dict(SMOOTH | {"max_length": 512}).infer(spec, DATA)
    with pytest.raises(ValueError, match="num_samples: 5000 windows of 64 tokens need more text"):
        Int8.from_dict(SMOOTH | {"num_samples": 5000}).infer(spec, DATA)
    with pytest.raises(ValueError, match="calibration: smoothing needs a calibration set"):
        Int8.from_dict(SMOOTH).infer(spec)
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    sparse = DenseCheckpoint(make_checkpoint(tmp_path / "experts", num_hidden_layers=1, **experts)).model_spec
    with pytest.raises(ValueError, match="mixtral has experts"):
        FP8().infer(sparse)


@pytest.mark.usefixtures("bf16_units")
def test_smoothing_needs_a_layer_and_its_activations_rounding_a_weight(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    plain, smoothed = Int8(), Int8.from_dict(SMOOTH)
    cpu, gpu = Target(name="cpu"), Target(name="gpu", gpus=1, memory=80 << 30)
    assert sum(plain.memory(spec, cpu).ram.values()) < sum(smoothed.memory(spec, cpu, DATA).ram.values())
    assert "activations of one batch" in smoothed.memory(spec, gpu, DATA).vram
    assert smoothed.memory(spec, cpu, DATA).totals["disk"] == plain.infer(spec).nbytes
    assert smoothed.work(spec, DATA).flops > 0 == plain.work(spec).flops
