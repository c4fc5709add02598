"""Distillation as a stage: what it learns from each kind of teacher, what it writes, what it refuses and that it survives a kill."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec, LogitsSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.distill import Distill
from stages.rtn import RTN
from stages.runtime.distillation import DistillationLoss, ResidentTeacher, numbered, stack
from stages.runtime.guard import check_checkpoint
from stages.runtime.loading import load_model
from stages.runtime.samples import window_samples
from stages.runtime.tensors import TensorReader
from stages.runtime.text import calibration_windows, load_tokenizer
from stages.structured_prune import StructuredPrune
from stages.teacher_logits import RecordTeacher
from tests.stages.models import make_checkpoint, save_tokenizer, write_documents
from tests.stages.processes import killed

PARAMS: dict[str, Any] = {"num_samples": 24, "max_length": 24, "global_batch_size": 4, "learning_rate": 2e-3}
WORDS = 307
Events = list[dict[str, Any]]


def as_checkpoint(folder: Path) -> DenseCheckpoint:
    return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return as_checkpoint(make_checkpoint(tmp_path_factory.mktemp("teacher"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def student(teacher: DenseCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    """The teacher without half of its heads and a third of its MLP."""
    folder = tmp_path_factory.mktemp("student")
    settings = {"head_ratio": 0.5, "mlp_ratio": 0.3, "round_to": 32, "group_size": 32}
    pruned: DenseCheckpoint = StructuredPrune.from_dict(settings).run(quiet(folder), teacher)
    return pruned


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = write_documents(tmp_path_factory.mktemp("data") / "train.jsonl")
    return Dataset(path, DatasetSpec(split="train", digest="d1", nbytes=path.stat().st_size))


def quiet(folder: Path) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(folder, lambda event: None)


def distill(
    folder: Path,
    student: DenseCheckpoint,
    train: Dataset,
    teacher: Artifact | None,
    events: Events | None = None,
    execution: dict[str, Any] | None = None,
    **params: Any,
) -> DenseCheckpoint:
    """The stage's result, after holding it to its plan."""
    stage = Distill.from_dict(PARAMS | params, {"device": "cpu"} | (execution or {}))
    inferred = stage.infer(student.spec, train.spec, teacher.spec if teacher else None)
    folder.mkdir(exist_ok=True)
    made = stage.run(Context(folder, (events if events is not None else []).append), student, train, teacher)
    check_checkpoint(made.path, inferred)
    assert made.config == student.config and not (made.path / "training").exists()
    assert (made.path / "tokenizer.json").read_bytes() == (student.path / "tokenizer.json").read_bytes()
    return made


def divergence(teacher: Checkpoint, student: Checkpoint, train: Dataset) -> float:
    """Mean KL(teacher || student) in nats over windows of the text, by whole logits of stock models."""
    ids = calibration_windows(train, load_tokenizer(teacher.path), 16, 24)
    with torch.no_grad():
        p, q = (AutoModelForCausalLM.from_pretrained(c.path)(ids).logits.float().log_softmax(-1) for c in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    reader = TensorReader(checkpoint.path)
    return {name: reader.read(name).float() for name in reader.table}


def largest_difference(one: Checkpoint, other: Checkpoint) -> float:
    mine, theirs = weights(one), weights(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def test_the_student_comes_closer_to_its_teacher(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset
) -> None:
    events: Events = []
    made = distill(tmp_path / "out", student, train, teacher, events, epochs=3)
    assert divergence(teacher, made, train) < 0.85 * divergence(teacher, student, train)
    curve = [event["metrics"] for event in events if event["event"] == "curve"]
    assert len(curve) == 18 and curve[-1]["kl_divergence"] < curve[0]["kl_divergence"]
    for point in curve:
        assert point["loss"] == pytest.approx(0.7 * 4 * point["kl_divergence"] + 0.3 * point["cross_entropy"], rel=1e-5)
    assert made.metrics["train_loss"] < made.metrics["first_train_loss"] == curve[0]["loss"]
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert note == f"training loss: {curve[0]['loss']:.3f} at the start, {made.metrics['train_loss']:.3f} at the end"


@pytest.mark.parametrize(("kind", "dtype"), [("packed", "bf16"), ("packed", "fp32"), ("nf4", "bf16")])
def test_a_teacher_may_be_packed(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset, kind: str, dtype: str
) -> None:
    guide: Checkpoint = teacher
    if kind == "packed":
        guide = RTN.from_dict({"group_size": 32, "num_bits": 8}).run(quiet(tmp_path / "packed"), teacher)
    precision = {"teacher_precision": "nf4"} if kind == "nf4" else {}
    made = distill(tmp_path / "out", student, train, guide, compute_dtype=dtype, **precision)
    assert divergence(teacher, made, train) < 0.9 * divergence(teacher, student, train)


def test_stored_logits_of_every_word_teach_what_the_teacher_does(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset
) -> None:
    recorded = {"num_samples": 24, "max_length": 24}
    everything = RecordTeacher.from_dict(recorded | {"k": WORDS}).run(quiet(tmp_path / "all"), teacher, train)
    few = RecordTeacher.from_dict(recorded | {"k": 8}).run(quiet(tmp_path / "few"), teacher, train)
    resident = distill(tmp_path / "resident", student, train, teacher, compute_dtype="fp32")
    stored = distill(tmp_path / "stored", student, train, everything, compute_dtype="fp32")
    coarse = distill(tmp_path / "coarse", student, train, few, compute_dtype="fp32")
    moved = largest_difference(resident, student)
    assert largest_difference(resident, stored) < 0.05 * moved  # AdamW magnifies rounding where gradients are tiny
    before, after = divergence(teacher, student, train), divergence(teacher, resident, train)
    assert divergence(teacher, stored, train) == pytest.approx(after, rel=1e-3)
    assert after < divergence(teacher, coarse, train) < before


def test_adapters_on_a_4_bit_student_leave_everything_else_as_it_was(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset
) -> None:
    made = distill(tmp_path / "out", student, train, teacher, method="lora", lora={"rank": 8}, epochs=3)
    assert divergence(teacher, made, train) < 0.9 * divergence(teacher, student, train)
    before = weights(student)
    for name, value in weights(made).items():
        assert torch.equal(value, before[name]) == ("_proj" not in name), name


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"model_type": "qwen2", "dtype": torch.float16}, {"model_type": "qwen3"}], ids=str
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_architecture_is_written_as_it_came(tmp_path: Path, train: Dataset, config: dict[str, Any], method: str) -> None:
    """Tied embeddings once, biases and head norms trained or untouched, each tensor in its own dtype; `distill` checks the table."""
    source = as_checkpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=1, **config))
    made = distill(tmp_path / "out", source, train, None, alpha=0, method=method)
    assert ("lm_head.weight" in weights(made)) == ("tie_word_embeddings" not in config)
    before = weights(source)
    changed = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if method == "full" or "_proj.weight" in name}


def test_without_a_teacher_it_is_training_on_the_text(tmp_path: Path, student: DenseCheckpoint, train: Dataset) -> None:
    stage = Distill.from_dict(PARAMS | {"alpha": 0})
    assert set(stage.inputs()) == {"student", "train"}
    events: Events = []
    made = distill(tmp_path / "out", student, train, None, events, alpha=0)
    curve = [event["metrics"] for event in events if event["event"] == "curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] and "kl_divergence" not in curve[0]
    assert stage.explain(student.spec, train.spec) == [
        "6 updates on 576 tokens, 96 in each",
        "alpha 0: no teacher, ordinary training on the text (cross-entropy)",
    ]
    assert made.metrics["tokens_per_second"] > 0


def test_execution_changes_only_how_it_is_computed(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset
) -> None:
    plain = distill(tmp_path / "plain", student, train, teacher, compute_dtype="fp32", execution={"micro_batch_size": 4})
    frugal = distill(
        tmp_path / "frugal",
        student,
        train,
        teacher,
        compute_dtype="fp32",
        execution={"micro_batch_size": 1, "gradient_checkpointing": True},
    )
    assert largest_difference(plain, frugal) < 0.05 * largest_difference(plain, student)
    again = distill(tmp_path / "again", student, train, teacher, compute_dtype="fp32", execution={"micro_batch_size": 4})
    assert largest_difference(plain, again) == 0


def test_the_loss_is_the_papers(teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset) -> None:
    """In fp32, against whole logits of both models."""
    windows = calibration_windows(train, load_tokenizer(student.path), 4, 24)
    models = {"teacher": load_model(teacher.path).float(), "student": load_model(student.path).float()}
    module = DistillationLoss(models["student"], ResidentTeacher(models["teacher"]), temperature=3.0, alpha=0.6)
    made = module(**stack(numbered(window_samples(windows, load_tokenizer(student.path), WORDS)).samples))
    z, y = (models[name](windows).logits[:, :-1].flatten(0, 1) for name in ("student", "teacher"))
    kl = torch.nn.functional.kl_div((z / 3).log_softmax(-1), (y / 3).log_softmax(-1), log_target=True, reduction="sum")
    expected = 0.6 * 9 * kl + 0.4 * torch.nn.functional.cross_entropy(z, windows[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(made["loss"], expected, rtol=1e-6, atol=0)
    made["loss"].backward()
    assert all(parameter.grad is None for parameter in models["teacher"].parameters())
    assert "teacher" not in dict(module.named_children())


def test_killed_in_the_middle_it_ends_with_the_same_bytes(
    tmp_path: Path, teacher: DenseCheckpoint, student: DenseCheckpoint, train: Dataset
) -> None:
    execution = {"checkpoint_minutes": 0}
    whole = distill(tmp_path / "whole", student, train, teacher, execution=execution)

    def die_at_the_fourth(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["label"] == "training" and event["done"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = tmp_path / "killed"
    folder.mkdir()
    stage = Distill.from_dict(PARAMS, {"device": "cpu"} | execution)
    killed(lambda: stage.run(Context(folder, die_at_the_fourth), student, train, teacher))
    events: Events = []
    made = distill(folder, student, train, teacher, events, execution=execution)
    assert [event["text"] for event in events if event["event"] == "resumed"] == ["update 3 of 6"]
    assert (made.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
    assert {file.name for file in made.path.iterdir()} == {file.name for file in whole.path.iterdir()}


def test_a_teacher_that_reads_other_tokens_is_refused(tmp_path: Path, student: DenseCheckpoint, train: Dataset) -> None:
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=2)
    save_tokenizer(other, 290)
    with pytest.raises(ValueError, match=r"inputs\.teacher: it has another tokenizer than the student; choose a teacher that reads"):
        distill(tmp_path / "out", student, train, as_checkpoint(other))


def test_a_text_of_unknown_words_is_refused(tmp_path: Path, train: Dataset) -> None:
    small = make_checkpoint(tmp_path / "small", vocab_size=260, num_hidden_layers=1)
    save_tokenizer(small, WORDS)
    with pytest.raises(ValueError, match=r"inputs\.train: it encodes to token id \d+, but the model has a vocabulary of 260"):
        distill(tmp_path / "out", as_checkpoint(small), train, None, alpha=0)


TEXT = DatasetSpec(split="train", digest="d1", nbytes=10**6)
MODEL = ModelSpec.from_config(
    {
        "model_type": "llama", "vocab_size": 307, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "dtype": "bfloat16",
    }
)  # fmt: skip
LOGITS = LogitsSpec(vocab_size=307, k=8, temperature=2.0, num_samples=24, max_length=24, data="d1", nbytes=1)
PACKED = RTN.from_dict({"group_size": 32}).infer(MODEL)
REFUSALS: list[tuple[dict[str, Any], Any, str]] = [
    ({"lora": {"rank": 8}}, MODEL, "lora: it has an effect only with method: lora; leave it out or write method: lora"),
    ({"method": "lora", "lora": {"rank": 65}}, MODEL, "lora.rank: 65 is more than the smaller side"),
    ({"alpha": 0, "temperature": 3}, None, "temperature: it has no effect with alpha 0, where there is no teacher; leave it out"),
    ({"alpha": 0, "teacher_precision": "nf4"}, None, "teacher_precision: it has no effect with alpha 0"),
    ({}, None, "inputs.teacher: alpha is not 0, so there must be one; write inputs: {teacher: model} or alpha: 0"),
    ({"teacher_precision": "nf4"}, PACKED, "teacher_precision: nf4 packs dense weights, and this teacher is packed already; leave it out"),
    ({"teacher_precision": "nf4"}, LOGITS, "teacher_precision: the teacher's logits are stored, no teacher is loaded; leave it out here"),
    ({"temperature": 3.0}, LOGITS, "temperature: the teacher's logits were stored with 2, here it is 3; write the same in both stages"),
    ({"num_samples": 20}, LOGITS, "num_samples: the teacher's logits were stored with 24, here it is 20; write the same in both stages"),
    ({"max_length": 20}, LOGITS, "max_length: the teacher's logits were stored with 24, here it is 20; write the same in both stages"),
    ({}, LOGITS.model_copy(update={"data": "d2"}), "inputs.train: the teacher's logits are of another text; give both stages the same"),
    ({}, LOGITS.model_copy(update={"vocab_size": 9}), "inputs.teacher: its logits are over 9 words, the student has 307; choose"),
    ({"max_length": 257}, MODEL, "max_length: 257 is more than the teacher's 256 positions; write 256 or less"),
]


@pytest.mark.parametrize(("params", "teacher", "sentence"), REFUSALS, ids=[sentence[:40] for _, _, sentence in REFUSALS])
def test_what_cannot_work_is_refused_in_the_plan(params: dict[str, Any], teacher: Any, sentence: str) -> None:
    stage = Distill.from_dict(PARAMS | params)
    with pytest.raises(ValueError) as refusal:
        stage.infer(MODEL, TEXT, teacher)
    assert str(refusal.value).startswith(sentence)
    Distill.from_dict(PARAMS).infer(MODEL, TEXT, MODEL)


@pytest.mark.parametrize(
    ("params", "beside"),
    [({}, set()), ({"teacher_precision": "nf4"}, {"peft", "bitsandbytes"}), ({"method": "lora"}, {"peft", "bitsandbytes"})],
)  # fmt: skip
def test_its_key_and_its_installation_need_only_the_libraries_that_compute(params: dict[str, Any], beside: set[str]) -> None:
    assert set(Distill.from_dict(PARAMS | params).libraries) == {"torch", "transformers", "compressed-tensors"} | beside


def test_another_vocabulary_and_conversations_are_refused_together() -> None:
    other = ModelSpec.of(MODEL.architecture.model_copy(update={"vocab_size": 400}))
    with pytest.raises(
        ValueError, match=r"inputs\.train: train holds conversations, .*; inputs\.teacher: it has 400 words in its vocabulary"
    ):
        Distill.from_dict(PARAMS).infer(MODEL, TEXT.model_copy(update={"format": "messages"}), other)


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 101}, {"alpha": 1.1}, {"learning_rate": 0}, {"lora": {"r": 8}}])
def test_values_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Distill.from_dict(PARAMS | params)


@pytest.mark.usefixtures("bf16_units")
def test_the_plan_itemises_memory_and_says_what_a_setting_means() -> None:
    host, gpu = Target.host(), Target(name="gpu", gpus=1, memory=1 << 34)
    full = Distill.from_dict(PARAMS).memory(MODEL, TEXT, host, MODEL)
    assert full.ram["trained weights, their gradients and AdamW's moments"] == 16 * MODEL.num_parameters
    assert full.ram["teacher"] == 2 * MODEL.num_parameters
    assert full.disk["checkpoint"] == MODEL.nbytes
    lora = Distill.from_dict(PARAMS | {"method": "lora", "teacher_precision": "nf4"}).memory(MODEL, TEXT, gpu, MODEL)
    assert "teacher" in lora.vram and lora.vram["teacher"] < full.ram["teacher"] and list(lora.ram) == ["the dataset's text and token ids"]
    assert sum(lora.vram.values()) < sum(full.ram.values())
    stored = Distill.from_dict(PARAMS | {"alpha": 1, "method": "lora"})
    assert "teacher" not in stored.memory(MODEL, TEXT, host, LOGITS).ram
    assert [sentence.partition(":")[0] for sentence in stored.explain(MODEL, TEXT, LOGITS)][1:] == ["teacher", "alpha 1", "method lora"]
