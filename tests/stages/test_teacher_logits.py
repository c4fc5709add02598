"""A teacher's logits, stored: what a brute-force forward gives, from either way of running it, also after an interruption."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, TeacherLogits, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec, LogitsSpec
from pipeline.compute_dtype import DECIDED
from pipeline.headers import CheckpointFileError, read_header
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.rtn import RTN
from stages.runtime import logits_layout, vocabulary
from stages.runtime.loading import load_model
from stages.runtime.teacher_logits import StoredLogits, Teacher, store_logits
from stages.runtime.tensors import TensorReader
from stages.runtime.text import calibration_windows, load_tokenizer
from stages.teacher_logits import RecordTeacher
from tests.stages.models import make_checkpoint, save_tensors, save_tokenizer, write_documents

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

SAMPLES, LENGTH, K = 10, 24, 12
PARAMS = {"num_samples": SAMPLES, "max_length": LENGTH, "k": K}
RESIDENT: dict[str, Any] = {"mode": "resident", "batch_size": 3}
LAYERWISE: dict[str, Any] = {"mode": "layerwise", "batch_size": 4}


@pytest.fixture(autouse=True)
def several_files_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a large model otherwise: 3 windows a file, 100 words of the vocabulary at a time."""
    monkeypatch.setattr(logits_layout, "FILE_BYTES", 3 * LENGTH * (K * 4 + 8))
    monkeypatch.setattr(vocabulary, "VOCABULARY_ROWS", 100)


def text(folder: Path) -> Dataset:
    path = write_documents(folder / "train.jsonl")
    return Dataset(path, DatasetSpec(split="train", digest="d1", nbytes=path.stat().st_size))


def as_checkpoint(folder: Path) -> DenseCheckpoint:
    return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))


def record(
    folder: Path, teacher: Checkpoint, train: Dataset, execution: dict[str, Any], events: Any = None, **params: Any
) -> TeacherLogits:
    """The stage's result, after holding it to what `infer` says: every byte of tensor data."""
    stage = RecordTeacher.from_dict(PARAMS | params, execution)
    folder.mkdir(exist_ok=True)
    made = stage.run(Context(folder, (lambda event: None) if events is None else events.append), teacher, train)
    inferred = stage.infer(teacher.model_spec, train.spec)
    assert made.spec == inferred
    assert sum(entry.nbytes for file in folder.glob("*.safetensors") for entry in read_header(file).values()) == inferred.nbytes
    return made


def forward(teacher: Checkpoint, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_model(teacher.path)(windows, use_cache=False).logits
    return logits.float()


@pytest.mark.parametrize("kind", ["bf16", "fp32", "packed"])
def test_both_modes_store_what_a_plain_forward_gives(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECIDED, "fp32" if kind == "fp32" else "bf16")
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    teacher: Checkpoint = as_checkpoint(make_checkpoint(tmp_path / "teacher", "qwen3", dtype=dtype, head_dim=32))
    if kind == "packed":
        (tmp_path / "packed").mkdir()
        teacher = RTN.from_dict({"group_size": 32}).run(Context(tmp_path / "packed", lambda event: None), teacher)
    train = text(tmp_path)
    expected = forward(teacher, calibration_windows(train, load_tokenizer(teacher.path), SAMPLES, LENGTH))
    found = {}
    for execution in (RESIDENT, LAYERWISE, LAYERWISE | {"hidden_states": "5KB"}):  # 5 KB: one window at a time
        made = record(tmp_path / str(len(found)), teacher, train, execution)
        ids, logits, log_sums = StoredLogits(made.path).batch(range(SAMPLES))
        assert ids.dtype == torch.int64 and logits.dtype == log_sums.dtype == torch.float32
        if kind == "fp32":  # kernels for other shapes add in another order; 16-bit results are rounded to the same
            torch.testing.assert_close(logits, expected.topk(K).values, atol=1e-5, rtol=0)
            torch.testing.assert_close(expected.gather(-1, ids), logits, atol=1e-5, rtol=0)
        else:
            assert torch.equal(logits, expected.topk(K).values)
            assert torch.equal(expected.gather(-1, ids), logits)
        torch.testing.assert_close(log_sums, (expected / 2.0).logsumexp(-1), atol=1e-5, rtol=0)
        kept = (expected / 2.0).softmax(-1).topk(K).values.sum(-1).mean().item()
        assert made.metrics == {"tokens": SAMPLES * LENGTH, "kept_probability": pytest.approx(kept, abs=1e-5)}
        found[len(found)] = logits, log_sums
    assert all(torch.equal(logits, found[0][0]) or kind == "fp32" for logits, _ in found.values())


def test_stored_logits_are_read_by_window_number(tmp_path: Path) -> None:
    teacher, train = as_checkpoint(make_checkpoint(tmp_path / "teacher")), text(tmp_path)
    made = record(tmp_path / "made", teacher, train, RESIDENT, temperature=0.7, k=5)
    stored = StoredLogits(made.path)
    assert len(list(made.path.glob("*.safetensors"))) == 2 and stored.nbytes == made.spec.nbytes  # k=5: 5 windows and more a file
    windows = calibration_windows(train, load_tokenizer(teacher.path), SAMPLES, LENGTH)
    assert stored.windows.dtype == torch.int64 and torch.equal(stored.windows, windows)
    whole = stored.batch(range(SAMPLES))
    chosen = torch.tensor([9, 0, 4, 4])
    assert all(torch.equal(part, tensor[chosen]) for part, tensor in zip(stored.batch(chosen), whole, strict=True))
    assert stored.layout.tokenizer == tokenizer_digest(teacher.path) and stored.layout.data == "d1"
    torch.testing.assert_close(whole[2], (forward(teacher, windows) / 0.7).logsumexp(-1), atol=1e-5, rtol=0)
    with pytest.raises(IndexError):
        stored.batch([SAMPLES])


def test_a_vocabulary_above_65536_words_has_ids_of_32_bits(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "teacher", vocab_size=66_000, num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    made = record(tmp_path / "made", as_checkpoint(folder), text(tmp_path), RESIDENT, num_samples=2)
    ids, logits, _ = StoredLogits(made.path).batch([0, 1])
    expected = forward(as_checkpoint(folder), StoredLogits(made.path).windows)
    assert ids.max() >= 1 << 16 and torch.equal(expected.gather(-1, ids), logits)
    assert isinstance(made.spec, LogitsSpec) and made.spec.nbytes == 2 * LENGTH * (K * (4 + 2) + 8)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.stage import Context
from stages.runtime import logits_layout, vocabulary
from stages.teacher_logits import RecordTeacher

folder, model, train, params, execution, file_bytes = json.loads(sys.argv[1])
logits_layout.FILE_BYTES = file_bytes

def emit(event):
    if event["event"] == "progress" and event["done"] > 6:  # two files of three windows are whole
        (Path(folder) / "logits-00003-of-00004.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

dataset = Dataset(Path(train), DatasetSpec(split="train", digest="d1", nbytes=10**6))
RecordTeacher.from_dict(params, execution).run(Context(Path(folder), emit), DenseCheckpoint(Path(model)), dataset)
"""


def test_a_killed_run_goes_on_with_what_is_missing_and_the_result_is_the_same(tmp_path: Path) -> None:
    teacher, train = as_checkpoint(make_checkpoint(tmp_path / "teacher")), text(tmp_path)
    unbroken = record(tmp_path / "unbroken", teacher, train, RESIDENT)
    folder = tmp_path / "made"
    folder.mkdir()
    arguments = [str(folder), str(teacher.path), str(train.path), PARAMS, RESIDENT, logits_layout.FILE_BYTES]
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(arguments)], cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}
    assert set(kept) == {"logits-00001-of-00004.safetensors", "logits-00002-of-00004.safetensors"}

    events: list[dict[str, Any]] = []
    made = record(folder, teacher, train, LAYERWISE, events)  # with other settings, as after running out of memory
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert {"event": "resumed", "text": "2 of 4 files were there"} in events
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in unbroken.path.iterdir())
    for one, other in zip(StoredLogits(folder).batch(range(SAMPLES)), StoredLogits(unbroken.path).batch(range(SAMPLES)), strict=True):
        if one.dtype == torch.float32:  # among equal logits, either word may be kept
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert made.metrics == {name: pytest.approx(value, abs=1e-6) for name, value in unbroken.metrics.items()}

    def no_teacher() -> Teacher:
        raise AssertionError("nothing is missing")

    (folder / logits_layout.LOGITS_FILE).unlink()
    store_logits(Context(folder, events.append), StoredLogits(unbroken.path).windows, StoredLogits(unbroken.path).layout, 1, no_teacher)
    assert StoredLogits(folder).layout == StoredLogits(unbroken.path).layout


def test_a_teacher_that_computes_nan_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "teacher")
    reader = TensorReader(folder)
    weights = {name: reader.read(name) for name in reader.table}
    weights["model.norm.weight"][3] = torch.nan
    save_tensors(folder, weights)
    for execution in (RESIDENT, LAYERWISE):
        with pytest.raises(ValueError, match="the teacher's logits are nan or infinite on the training text"):
            record(tmp_path / execution["mode"], as_checkpoint(folder), text(tmp_path), execution)


def refusal(check: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        check()
    return str(caught.value)


def test_what_cannot_be_is_refused_before_anything_is_read() -> None:
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    teacher = ModelSpec.from_config(config)
    train = DatasetSpec(split="train", digest="", nbytes=10_000)

    def infer(data: DatasetSpec = train, **params: Any) -> str:
        return refusal(lambda: RecordTeacher.from_dict(params).infer(teacher, data))

    assert infer(k=301) == "k: 301 is more than the 300 words of the teacher's vocabulary; write 300 or less"
    assert infer(max_length=129).startswith("max_length: 129 is more than the model's 128 positions")
    assert infer(max_length=128, num_samples=100).startswith("num_samples: 100 windows of 128 tokens need more text than the 10,000 bytes")
    assert infer(train.model_copy(update={"format": "messages"})).startswith("train: train holds conversations")
    with pytest.raises(ValidationError, match=r"hidden_states\n.*it has an effect only with mode: layerwise"):
        RecordTeacher.from_dict({}, {"hidden_states": "1GiB"})
    for params in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValidationError):
            RecordTeacher.from_dict(params)


def test_the_plan_says_what_layer_by_layer_costs() -> None:
    """A 70B teacher in a machine of 64 GiB: half a million tokens in three sweeps of its 141 GB, 105 MB of logits."""
    config = {"model_type": "llama", "dtype": "bfloat16", "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672,
              "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192}  # fmt: skip
    teacher, train = ModelSpec.from_config(config), DatasetSpec(split="train", digest="", nbytes=10_000_000)
    logits_layout.FILE_BYTES = 16 << 20  # as shipped; undone by the fixture
    params = {"num_samples": 1024, "max_length": 512}
    once = RecordTeacher.from_dict(params, {"mode": "layerwise", "hidden_states": "16GiB"})
    thrice = RecordTeacher.from_dict(params, {"mode": "layerwise"})
    assert once.explain(teacher, train)[1] == "mode layerwise: reads the teacher's 141 GB once"
    assert thrice.explain(teacher, train)[1] == "mode layerwise: reads the teacher's 141 GB 3 times, fewer with more hidden_states"
    host = Target(name="host", ram=64 << 30)
    assert thrice.memory(teacher, train, host).totals["ram"] < 10 << 30 < 141_000_000_000
    assert RecordTeacher.from_dict(params).memory(teacher, train, host).totals["ram"] > 141_000_000_000
    spec = thrice.infer(teacher, train)
    assert spec.nbytes == 1024 * 512 * (32 * (4 + 2) + 8) == thrice.memory(teacher, train, host).totals["disk"]


def test_damaged_or_incomplete_logits_are_refused(tmp_path: Path) -> None:
    teacher, train = as_checkpoint(make_checkpoint(tmp_path / "teacher")), text(tmp_path)
    folder = record(tmp_path / "made", teacher, train, RESIDENT).path
    content = json.loads((folder / "logits.json").read_text())
    (folder / "logits.json").write_text(json.dumps(content | {"k": K + 1}))
    with pytest.raises(CheckpointFileError, match=r"does not hold what logits\.json beside it says"):
        StoredLogits(folder)
    (folder / "logits.json").write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(CheckpointFileError, match="not what this version writes"):
        StoredLogits(folder)
    (folder / "logits.json").write_text(json.dumps(content))
    (folder / "logits-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match="holds 7 of 10 windows of logits"):
        StoredLogits(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "teacher", vocab_size=257)
    save_tokenizer(folder, 400)
    with pytest.raises(ValueError, match=r"inputs\.train: it encodes to token id \d+, but the teacher has a vocabulary of 257"):
        record(tmp_path / "made", as_checkpoint(folder), text(tmp_path), RESIDENT)
