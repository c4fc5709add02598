"""GPTQ through llm-compressor: what it saves is what it made, it beats rounding, and it does so the same way each time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint, sha256_file
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import tensor_table
from pipeline.stage import Context
from pipeline.target import Target
from stages.evaluate import Evaluate
from stages.gptq import GPTQ
from stages.rtn import RTN
from stages.runtime import guard
from stages.runtime.guard import check_checkpoint
from tests.stages.models import make_checkpoint, write_documents

SMALL = {"num_bits": 4, "group_size": 32, "num_samples": 8, "max_length": 64}
DATA = DatasetSpec(split="calibration", digest="0", nbytes=1000)


def calibrate(source: Path, output: Path, events: list[dict[str, Any]] | None = None, **params: object) -> QuantizedCheckpoint:
    stage = GPTQ.from_dict({**SMALL, **params}, {"batch_size": 4})
    data = Dataset(write_documents(output.parent / "calibration.jsonl"))
    return stage.run(Context(output, (events if events is not None else []).append), DenseCheckpoint(source), data)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        ({"tie_word_embeddings": True}, {"ignore": []}),
        ({}, {"num_bits": 3, "symmetric": False, "ignore": []}),
        ({"attention_bias": True, "shard_size": "40KB"}, {"num_bits": 8, "ignore": ["lm_head", "re:.*layers.0.mlp.*"]}),
        ({"model_type": "qwen3", "head_dim": 32}, {"num_bits": 2, "symmetric": False}),
        ({"model_type": "qwen2", "dtype": torch.float32}, {"actorder": None}),
    ],
    ids=str,
)
def test_the_inferred_spec_is_what_stands_on_disk(tmp_path: Path, config: dict, params: dict) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, **config)
    inferred = GPTQ.from_dict({**SMALL, **params}).infer(DenseCheckpoint(source).model_spec, DATA)
    made = calibrate(source, tmp_path / "out", **params)
    assert {name: (entry.dtype, entry.shape) for name, entry in tensor_table(made.path).items()} == inferred.tensors()
    check_checkpoint(made.path, inferred)
    own = made.config
    assert own.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert own == DenseCheckpoint(source).config
    assert not (made.path / "recipe.yaml").exists()
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")(torch.arange(9)[None]).logits.isfinite().all()


def test_it_is_closer_to_the_source_than_rounding_to_nearest(tmp_path: Path) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2))
    for actorder in ("static", None):
        made = calibrate(source.path, tmp_path / f"gptq-{actorder}", num_bits=3, actorder=actorder, num_samples=32)
        params = {"num_bits": 3, "group_size": 32}
        nearest = RTN.from_dict(params).run(Context(tmp_path / "rtn", lambda event: None), source)
        text = Dataset(tmp_path / "calibration.jsonl")
        calibrated_kl, nearest_kl = (
            Evaluate().run(Context(tmp_path / "report", lambda event: None), model, text, source).metrics["kl_divergence"]
            for model in (made, nearest)
        )
        assert calibrated_kl < 0.8 * nearest_kl


def test_two_runs_give_the_same_bytes_whatever_the_global_generator_held(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.append(sha256_file(calibrate(source, tmp_path / str(seed)).path / "model.safetensors"))
    assert digests[0] == digests[1]


def test_progress_counts_every_layer_and_batch(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    calibrate(make_checkpoint(tmp_path / "source", num_hidden_layers=2), tmp_path / "out", events)
    counted = [event["done"] for event in events if event.get("label") == "calibrating"]
    assert counted == list(range(1, 2 * 2 * 2 + 1))  # layers x batches x (gather, hand on)
    assert not [event for event in events if event["event"] == "note"]


def test_layers_whose_hessian_cannot_be_inverted_are_named(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    calibrate(source, tmp_path / "out", events, dampening_frac=0, num_samples=1, max_length=8)  # 8 tokens, 64 columns
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert len(notes) == 1
    assert "rounded to nearest" in notes[0]
    assert "model.layers.0.self_attn.q_proj" in notes[0]


def test_a_saved_checkpoint_that_is_not_the_calibrated_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved weights are the source's, rounded with scales that do not belong to them."""
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    from stages.runtime import packing

    pack = packing.pack_weight
    monkeypatch.setattr(packing, "pack_weight", lambda weight, form, scale, zero: pack(weight, form, scale * 1.5, zero))
    with pytest.raises(ValueError, match="does not reload as the model that was made"):
        calibrate(source, tmp_path / "out", num_bits=2)


def test_what_cannot_be_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    with pytest.raises(ValueError, match="max_length 512 is more than the model's 256 positions; write 256 or less"):
        GPTQ.from_dict({**SMALL, "max_length": 512}).infer(spec, DATA)
    with pytest.raises(ValueError, match="group_size: 128 does not divide"):
        GPTQ().infer(spec, DATA)
    with pytest.raises(ValueError, match="did you mean 'lm_head'"):
        GPTQ.from_dict({**SMALL, "ignore": ["lmhead"]}).infer(spec, DATA)
    with pytest.raises(ValueError, match="Input should be 'static'"):
        GPTQ.from_dict({"actorder": "group"})


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1)
    with pytest.raises(ValueError, match="windows of 64 tokens, 5000 were asked for"):
        calibrate(source, tmp_path / "out", num_samples=5000)


@pytest.mark.usefixtures("bf16_units")
def test_memory_itemises_model_hessians_and_hidden_states(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    need = GPTQ.from_dict(SMALL).memory(spec, DATA, Target(name="cpu"))
    assert need.ram["model"] == spec.nbytes
    assert need.ram["Hessians of one layer"] == 4 * (4 * 64**2 + 2 * 64**2 + 96**2)  # q k v o, gate up, down
    assert need.ram["calibration hidden states"] == 2 * 8 * 64 * 64 * 2
    on_gpu = GPTQ.from_dict(SMALL).memory(spec, DATA, Target(name="gpu", gpus=1))
    assert "Hessians of one layer" in on_gpu.vram
    assert "model" in on_gpu.ram
    json.dumps(need.model_dump())


def test_the_reloaded_model_is_the_calibrated_one_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at 8 bits in bf16, where a weight's product with its scale is rounded more coarsely than its level."""
    monkeypatch.setattr(guard, "PROBE_TOLERANCE", 0.0)
    calibrate(make_checkpoint(tmp_path / "source", num_hidden_layers=2), tmp_path / "out", num_bits=8, symmetric=False)
