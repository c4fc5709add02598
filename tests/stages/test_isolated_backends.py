"""The libraries themselves, each in its environment (built under outputs/envs on first use): what they make loads and is the model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.envs import Environments
from pipeline.headers import tensor_table
from pipeline.isolated import Isolated
from pipeline.stage import Context, Stage
from stages.awq import AWQ
from stages.gptq import GPTQ
from stages.runtime.guard import check_checkpoint
from stages.runtime.loading import load_model
from stages.runtime.scoring import token_losses
from stages.runtime.text import calibration_windows, load_tokenizer
from tests.stages.models import make_checkpoint, write_documents

pytestmark = pytest.mark.extras
ROOT = Path(__file__).parents[2]
SMALL, TEXT = ROOT / "assets" / "small-llama", ROOT / "assets" / "data"
DATA = DatasetSpec(split="calibration", digest="0", nbytes=250_000)
LIBRARIES = [(GPTQ, "gptqmodel"), (GPTQ, "auto_gptq"), (AWQ, "gptqmodel"), (AWQ, "autoawq")]


def quantize(
    stage: type[Stage], name: str, source: Path, data: Path, folder: Path, **params: Any
) -> tuple[QuantizedCheckpoint, list[dict[str, Any]]]:
    """The result, and the events it came with. Guarded as a worker does."""
    configured, events = stage.from_dict({"backend": name, **params}, {"batch_size": 4}), []
    python = Environments(ROOT / "outputs").python(configured.env, print)
    for part in ("job", "output"):
        (folder / part).mkdir(parents=True)
    context = Context(folder / "output", events.append, Isolated(python, folder / "job", folder / "output"))
    made = configured.run(context, DenseCheckpoint(source), Dataset(data))
    inferred = configured.infer(DenseCheckpoint(source).model_spec, DATA)
    assert {name: (entry.dtype, entry.shape) for name, entry in tensor_table(made.path).items()} == inferred.tensors()
    check_checkpoint(made.path, inferred)
    own = made.config
    assert own.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert own == DenseCheckpoint(source).config, "the source's own config"
    assert sorted(file.name for file in made.path.iterdir() if file.suffix == ".safetensors") == ["model.safetensors"]
    assert not (made.path / "backend").exists(), "what the library saved is gone"
    return made, events


@pytest.mark.parametrize(("stage", "name"), LIBRARIES)
def test_the_small_model_keeps_its_perplexity(tmp_path: Path, stage: type[Stage], name: str) -> None:
    made, events = quantize(stage, name, SMALL, TEXT / "calibration.jsonl", tmp_path, group_size=64, num_samples=32, max_length=128)
    windows = calibration_windows(Dataset(TEXT / "eval.jsonl"), load_tokenizer(SMALL), 8, 256)
    loss, source = (token_losses(load_model(folder), windows).mean().item() for folder in (made.path, SMALL))
    assert math.exp(loss) < 1.06 * math.exp(source), f"{math.exp(loss):.2f} of {math.exp(source):.2f}"
    model, report = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)  # as anyone would
    assert not any(report.values()), report
    assert model(input_ids=windows[:1]).logits.isfinite().all()
    shimmed = [event["text"] for event in events if event["event"] == "note" and "was made for a GPU" in event["text"]]
    assert len(shimmed) == (name != "gptqmodel" and not torch.cuda.is_available()), "disclosed where it was done"


UNLIKE: list[tuple[type[Stage], str, dict[str, Any], dict[str, Any]]] = [
    (GPTQ, "auto_gptq", {"model_type": "qwen2"}, {"symmetric": False}),
    (GPTQ, "auto_gptq", {"model_type": "mistral", "shard_size": "60KB"}, {"num_bits": 8, "actorder": None}),
    (GPTQ, "auto_gptq", {"attention_bias": True, "tie_word_embeddings": True}, {"num_bits": 2}),
    (GPTQ, "gptqmodel", {"model_type": "qwen3", "head_dim": 32}, {"symmetric": False}),
    (GPTQ, "gptqmodel", {"model_type": "qwen2"}, {"num_bits": 8, "actorder": None}),
    (GPTQ, "gptqmodel", {"model_type": "mistral", "shard_size": "60KB"}, {"num_bits": 2}),
    (AWQ, "autoawq", {"model_type": "qwen2"}, {}),
    (AWQ, "autoawq", {"model_type": "qwen3", "head_dim": 32}, {"duo_scaling": False}),
    (AWQ, "autoawq", {"model_type": "mistral", "shard_size": "60KB", "tie_word_embeddings": True}, {}),
    (AWQ, "gptqmodel", {"model_type": "qwen3", "head_dim": 32}, {}),
    (AWQ, "gptqmodel", {"model_type": "qwen2"}, {}),
    (AWQ, "gptqmodel", {"model_type": "mistral", "shard_size": "60KB"}, {}),
]


@pytest.mark.parametrize(("stage", "name", "config", "params"), UNLIKE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_unlike_models_and_settings_come_back_as_what_the_library_made(
    tmp_path: Path, stage: type[Stage], name: str, config: dict[str, Any], params: dict[str, Any]
) -> None:
    """`quantize` compares the losses of the reloaded checkpoint with the library's own."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    source = make_checkpoint(tmp_path / "source", **{**sizes, **config})
    data = write_documents(tmp_path / "calibration.jsonl")
    quantize(stage, name, source, data, tmp_path / "made", group_size=32, num_samples=8, max_length=32, **params)
