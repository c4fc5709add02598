"""The stage keeps its promise: what `infer` says is what `run` makes."""

import json
from pathlib import Path

import pytest
import torch
from llmpress_low_rank import LowRank, truncate
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.artifact import DenseCheckpoint
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.guard import check_checkpoint
from stages.runtime.tensors import TensorReader


@pytest.fixture
def model(tmp_path: Path) -> DenseCheckpoint:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, dtype=torch.bfloat16)).bfloat16().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    return DenseCheckpoint(tmp_path / "source", ModelSpec.from_config(config))


def test_infer_equals_run(model: DenseCheckpoint, tmp_path: Path) -> None:
    stage, events = LowRank.from_dict({"energy": 0.5}), []
    made = stage.run(Context(tmp_path / "made", events.append), model)
    check_checkpoint(made.path, stage.infer(model.spec))  # names, dtypes, shapes, config.json; no nan or inf
    before, after = TensorReader(model.path), TensorReader(made.path)
    changed = {name for name in before.table if not torch.equal(before.read(name), after.read(name))}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert 1 <= made.metrics["mean_rank"] < 32 and "ranks kept of 32" in events[-1]["text"]


def test_a_matrix_of_low_rank_is_left_as_it_is() -> None:
    weight = torch.randn(20, 3) @ torch.randn(3, 30)
    kept, rank = truncate(weight, 0.999999)
    assert rank == 3
    torch.testing.assert_close(kept, weight, atol=1e-4, rtol=1e-4)
