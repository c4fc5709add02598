"""QLoRA as a stage: it recovers what pruning broke, its two outputs agree, and neither kill nor micro batch leaves a trace."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pipeline.artifact import Adapter, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.evaluate import Evaluate
from stages.qlora import QLoRA, QLoRAOutputs, QLoRASpecs
from stages.runtime.causal_loss import CausalLoss
from stages.runtime.guard import check_checkpoint
from stages.runtime.loading import COMPUTE_DTYPES, load_model
from stages.runtime.lora import add_lora, load_nf4
from stages.runtime.training_settings import LoRAParams, TrainingParams, kept_bytes
from stages.structured_prune import StructuredPrune
from tests.stages.models import make_checkpoint, write_documents
from tests.stages.processes import killed

ASSETS = Path(__file__).parents[2] / "assets"
SMALL = {"rank": 4, "num_samples": 12, "max_length": 32, "global_batch_size": 4, "learning_rate": 1e-3, "compute_dtype": "fp32"}
TEXT = DatasetSpec(split="train", digest="0", nbytes=1_000_000)
CHATS = TEXT.model_copy(update={"format": "messages"})

Events = list[dict[str, Any]]


def quiet(event: dict[str, Any]) -> None:
    pass


def checkpoint(folder: Path) -> DenseCheckpoint:
    return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))


@pytest.fixture
def source(tmp_path: Path) -> DenseCheckpoint:
    return checkpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2, attention_bias=True))


@pytest.fixture
def text(tmp_path: Path) -> Dataset:
    return Dataset(write_documents(tmp_path / "train.jsonl"), TEXT)


def tune(
    output: Path,
    model: DenseCheckpoint,
    data: Dataset,
    emit: Callable[[dict[str, Any]], None] = quiet,
    execution: dict[str, Any] | None = None,
    **params: Any,
) -> Any:
    output.mkdir(exist_ok=True)
    stage = QLoRA.from_dict({**SMALL, **params}, {"micro_batch_size": 2, **(execution or {})})
    return stage.run(Context(output, emit), model, data)


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_recovers_perplexity_that_pruning_cost(tmp_path: Path) -> None:
    source = checkpoint(ASSETS / "small-llama")
    pruned = StructuredPrune.from_dict({"mlp_ratio": 0.667}).run(Context(tmp_path / "pruned", quiet), source)
    train = Dataset(ASSETS / "data/train.jsonl", TEXT)
    events: Events = []
    settings = {
        "num_samples": 40,
        "epochs": 4,
        "max_length": 128,
        "global_batch_size": 8,
        "learning_rate": 3e-3,
        "rank": 16,
    }
    made = tune(tmp_path / "tuned", pruned, train, events.append, {"micro_batch_size": 8}, **settings)
    losses = [event["metrics"]["loss"] for event in events if event["event"] == "curve"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])  # the same windows
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert len(notes) == 1 and notes[0].startswith(f"training loss: {losses[0]:.3f} at the start")
    assert made.adapter.metrics["first_train_loss"] == losses[0]
    held_out = Dataset(ASSETS / "data/eval.jsonl")
    judge = Evaluate.from_dict({"max_documents": 2, "max_length": 256})
    before, after = (
        judge.run(Context(tmp_path / name, quiet), model, held_out).metrics["perplexity"]
        for name, model in (("before", pruned), ("after", made.model))
    )
    assert after < 0.85 * before


def test_the_outputs_are_a_merged_checkpoint_and_a_peft_folder_that_agree(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    made = tune(tmp_path / "out", source, text)
    assert isinstance(made, QLoRAOutputs)
    inferred = QLoRA.from_dict(SMALL).infer(source.spec, TEXT)
    assert isinstance(inferred, QLoRASpecs) and made.model.spec == inferred.model == source.spec and made.adapter.spec == inferred.adapter
    check_checkpoint(made.model.path, inferred.model)
    weights = adapter_weights(made.adapter.path)
    assert sum(tensor.nbytes for tensor in weights.values()) == inferred.adapter.nbytes
    assert all(tensor.any() for tensor in weights.values())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapter", "model"]


def test_merging_changes_nothing_of_what_the_adapter_computes_beside_the_base(tmp_path: Path, text: Dataset) -> None:
    source = checkpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2, dtype=torch.float32))
    made = tune(tmp_path / "out", source, text)
    models = (
        load_model(source.path),
        load_model(made.model.path),
        PeftModel.from_pretrained(load_model(source.path), made.adapter.path).eval(),
    )
    ids = torch.arange(3, 99).view(2, 48)
    with torch.no_grad():
        before, merged, beside = (model(ids).logits for model in models)
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 0.05


def test_without_merging_the_adapter_is_the_only_output(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    stage = QLoRA.from_dict({**SMALL, "merge": False})
    assert list(stage.outputs()) == ["adapter"]
    made = tune(tmp_path / "out", source, text, merge=False)
    assert isinstance(made, Adapter) and made.path == tmp_path / "out"
    assert made.spec == stage.infer(source.spec, TEXT)
    assert sorted(file.name for file in made.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    both = tune(tmp_path / "both", source, text)
    assert all(torch.equal(tensor, adapter_weights(made.path)[name]) for name, tensor in adapter_weights(both.adapter.path).items())


def test_execution_settings_do_not_change_what_is_learned(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    expected = adapter_weights(tune(tmp_path / "0", source, text).adapter.path)
    for number, execution in enumerate([{"micro_batch_size": 3}, {"micro_batch_size": 9}, {"gradient_checkpointing": True}], 1):
        found = adapter_weights(tune(tmp_path / str(number), source, text, execution=execution).adapter.path)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)  # AdamW moves each weight by about 1e-3 an update


def test_a_killed_training_continues_to_the_same_adapter(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    settings = {"lora_dropout": 0.1, "epochs": 2}
    expected = tune(tmp_path / "unbroken", source, text, **settings)

    def die(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["label"] == "training" and event["done"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    killed(lambda: tune(tmp_path / "killed", source, text, die, {"checkpoint_minutes": 0}, **settings))
    assert [folder.name for folder in (tmp_path / "killed/training").glob("checkpoint-*")] == ["checkpoint-3"]
    saved = (tmp_path / "killed/training/checkpoint-3/model.safetensors").stat().st_size
    assert saved < 1.3 * expected.adapter.spec.nbytes  # the adapter, not the model

    events: Events = []
    made = tune(tmp_path / "killed", source, text, events.append, {"checkpoint_minutes": 0}, **settings)
    assert [event["text"] for event in events if event["event"] == "resumed"] == ["update 3 of 6"]
    assert [event["done"] for event in events if event.get("label") == "training"] == [4, 5, 6]
    for name, tensor in adapter_weights(expected.adapter.path).items():
        assert torch.equal(tensor, adapter_weights(made.adapter.path)[name]), name
    assert (made.model.path / "model.safetensors").read_bytes() == (expected.model.path / "model.safetensors").read_bytes()
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == ["adapter", "model"]


def test_a_training_that_diverges_is_one_sentence(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    with pytest.raises(ValueError, match=r"the training diverged at update \d of 3: .* lower learning_rate"):
        tune(tmp_path / "out", source, text, learning_rate=1e30, lr_scheduler_type="constant", max_grad_norm=0)


def test_conversations_are_learned_by_the_models_own_template(tmp_path: Path) -> None:
    source = checkpoint(ASSETS / "small-llama")
    turns = [{"role": "user", "content": "def"}, {"role": "assistant", "content": " perplexity"}]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": [*turns, {"role": "user", "content": f"{i}"}]}) + "\n" for i in range(8)))
    data = Dataset(file, CHATS.model_copy(update={"file_format": "jsonl"}))
    settings = {"num_samples": 8, "epochs": 4, "learning_rate": 5e-3, "merge": False}
    losses = {}
    for loss_on in (None, "assistant", "all"):
        made = tune(tmp_path / str(loss_on), source, data, loss_on=loss_on, **settings)
        losses[loss_on] = made.metrics["first_train_loss"], made.metrics["train_loss"]
    assert losses[None] == losses["assistant"] != losses["all"]
    assert losses["assistant"][1] < 0.5 * losses["assistant"][0]


def test_what_cannot_be_is_refused_before_any_weight_is_read(source: DenseCheckpoint) -> None:
    def infer(data: DatasetSpec = TEXT, **params: Any) -> None:
        QLoRA.from_dict({**SMALL, **params}).infer(source.spec, data)

    infer(CHATS, loss_on="all")
    with pytest.raises(ValueError, match=r"^loss_on: train is plain text"):
        infer(loss_on="all")
    with pytest.raises(ValueError, match=r"^rank: 33 is more than the smaller side"):
        infer(rank=33)
    with pytest.raises(ValueError, match=r"^max_length: 512 is more than the model's 256 positions"):
        infer(max_length=512)
    with pytest.raises(ValueError, match=r"^num_samples: 100000 windows"):
        infer(num_samples=100_000)
    with pytest.raises(ValueError, match="Input should be 'assistant' or 'all'"):
        infer(loss_on="user")


def test_memory_holds_the_base_in_four_bits_and_optimizer_states_for_the_adapter_alone(source: DenseCheckpoint) -> None:
    stage = QLoRA.from_dict({**SMALL, "compute_dtype": "bf16"})
    need, adapter = stage.memory(source.spec, TEXT, Target(name="cpu")), stage.infer(source.spec, TEXT).adapter
    assert need.ram["adapter, its gradient and AdamW's moments"] == 16 * adapter.num_parameters
    assert need.disk["merged checkpoint"] == source.spec.nbytes
    assert "merged checkpoint" not in QLoRA.from_dict({**SMALL, "merge": False}).memory(source.spec, TEXT, Target(name="cpu")).disk
    on_gpu = stage.memory(source.spec, TEXT, Target(name="gpu", gpus=1))
    assert "NF4 base" in on_gpu.vram and "NF4 base" not in on_gpu.ram
    less = QLoRA.from_dict({**SMALL, "compute_dtype": "bf16"}, {"gradient_checkpointing": True}).memory(
        source.spec, TEXT, Target(name="cpu")
    )
    assert less.ram["activations of a micro batch"] < need.ram["activations of a micro batch"]
    assert source.spec.nbytes > need.ram["NF4 base"] > source.spec.nbytes / 4


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("lora", [None, LoRAParams(rank=4), LoRAParams(rank=4, lora_dropout=0.1)], ids=str)
def test_what_a_layer_keeps_for_its_backward_pass_is_what_the_plan_counts(
    tmp_path: Path, model_type: str, dtype: Literal["bf16", "fp32"], lora: LoRAParams | None
) -> None:
    """By what autograd saves of two layers more, and of twice the tokens."""
    kept = {}
    for layers in (1, 3):
        source = checkpoint(make_checkpoint(tmp_path / str(layers), model_type, num_hidden_layers=layers))
        model = load_nf4(source.path, "cpu", COMPUTE_DTYPES[dtype]) if lora else load_model(source.path).float()
        if lora:
            add_lora(model, lora.rank, lora.lora_alpha, lora.lora_dropout, 0)
        for length in (32, 64):
            kept[layers, length] = saved_bytes(CausalLoss(model.train()), torch.arange(2 * length).view(2, length), dtype == "bf16")
    found = (kept[3, 64] - kept[1, 64] - kept[3, 32] + kept[1, 32]) / (2 * 64)
    assert found == pytest.approx(kept_bytes(TrainingParams(learning_rate=1, compute_dtype=dtype), source.model_spec, lora), rel=0.01)


def saved_bytes(module: torch.nn.Module, ids: torch.Tensor, autocast: bool) -> int:
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage  # which is held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, autocast):
        module(input_ids=ids, labels=ids, attention_mask=None)
    return sum(storage.nbytes() for storage in found.values())


def test_the_plan_says_how_much_is_trained_on_what(source: DenseCheckpoint) -> None:
    count = QLoRA.from_dict(SMALL).infer(source.spec, TEXT).adapter.num_parameters
    said = f"trains {count:,} weights ({100 * count / source.spec.num_parameters:.2g} % of the model's) in 3 updates on "
    assert QLoRA.from_dict(SMALL).explain(source.spec, TEXT) == [said + "384 tokens"]
    chats = QLoRA.from_dict(SMALL).explain(source.spec, CHATS)
    assert chats == [said + "12 conversations of at most 32 tokens, learning what the assistant says"]
