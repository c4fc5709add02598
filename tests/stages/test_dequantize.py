"""Dequantizing gives the very weights that transformers computes from the packed checkpoint, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.headers import CheckpointFileError, tensor_table
from pipeline.stage import Context
from pipeline.target import Target
from stages.dequantize import Dequantize
from stages.rtn import RTN
from stages.runtime import packing
from stages.runtime.guard import check_checkpoint
from tests.stages.models import make_checkpoint


def packed(folder: Path, config: dict | None = None, **params: object) -> QuantizedCheckpoint:
    source = DenseCheckpoint(make_checkpoint(folder / "source", **(config or {})))
    return RTN.from_dict({"group_size": 32, **params}).run(Context(folder / "packed", lambda event: None), source)


def dequantize(model: QuantizedCheckpoint, output: Path) -> DenseCheckpoint:
    return Dequantize().run(Context(output, lambda event: None), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("params", [{"num_bits": 3, "symmetric": False, "ignore": []}, {"num_bits": 8}, {"num_bits": 2}], ids=str)
def test_weights_equal_those_of_stock_transformers_bit_for_bit(tmp_path: Path, dtype: torch.dtype, params: dict) -> None:
    model = packed(tmp_path, {"dtype": dtype, "attention_bias": True}, **params)
    made = dequantize(model, tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(model.path, dtype="auto")
    ours = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")
    ids = torch.arange(30).view(1, 30)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)  # the forward decompresses theirs
    weights = theirs.state_dict()
    assert all(torch.equal(tensor, weights[name]) and tensor.dtype == dtype for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"model_type": "qwen3", "head_dim": 32}, {"shard_size": "40KB"}], ids=str
)
def test_nothing_is_left_over_and_the_inferred_spec_stands_on_disk(tmp_path: Path, config: dict) -> None:
    model = packed(tmp_path, config, symmetric=False)
    made = dequantize(model, tmp_path / "dense")
    inferred = Dequantize().infer(model.model_spec)
    assert {name: (entry.dtype, entry.shape) for name, entry in tensor_table(made.path).items()} == inferred.tensors()
    assert made.config == DenseCheckpoint(tmp_path / "source").config
    assert made.spec == inferred == DenseCheckpoint(tmp_path / "source").model_spec
    check_checkpoint(made.path, inferred)


def test_rows_are_unpacked_in_blocks_without_changing_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tmp_path, num_bits=3, symmetric=False, ignore=[])
    whole = dequantize(model, tmp_path / "whole")
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 1)
    blocks = dequantize(model, tmp_path / "blocks")
    assert (whole.path / "model.safetensors").read_bytes() == (blocks.path / "model.safetensors").read_bytes()


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    model = packed(tmp_path)
    config = model.config
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False  # so zero points are looked for
    (model.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFileError, match="weight_zero_point"):
        dequantize(QuantizedCheckpoint(model.path), tmp_path / "dense")


def test_the_plan_says_what_the_conversion_costs(tmp_path: Path) -> None:
    spec = packed(tmp_path).model_spec
    assert "baked into dense weights" in Dequantize().explain(spec)[0]
    assert Dequantize().memory(spec, Target(name="any")).totals["disk"] == spec.dense().nbytes
