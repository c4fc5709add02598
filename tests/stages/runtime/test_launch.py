"""A stage in several processes: what it trains is what one process trains, it survives a kill, and it leaves no process behind."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.distill import Distill
from stages.runtime import launch
from stages.runtime.launch import Processes, read_config
from stages.runtime.tensors import TensorReader
from stages.runtime.training import update_batches
from tests import toys
from tests.stages.models import make_checkpoint, write_documents
from tests.stages.processes import killed

PARAMS: dict[str, Any] = {"num_samples": 16, "max_length": 24, "global_batch_size": 4, "learning_rate": 2e-3}
COPIES = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
"""
SHARDS = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_activation_checkpointing: false
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
num_machines: 1
num_processes: 2
"""
Emit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def checkpoint(seed: int) -> DenseCheckpoint:
        folder = tmp_path_factory.mktemp("model")
        make_checkpoint(folder, seed=seed, num_hidden_layers=2, tie_word_embeddings=True, dtype=torch.float32)
        return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))

    path = write_documents(tmp_path_factory.mktemp("data") / "train.jsonl")
    text = Dataset(path, DatasetSpec(split="train", digest="d1", nbytes=path.stat().st_size))
    return {"student": checkpoint(0), "teacher": checkpoint(1), "train": text}


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a configuration for two processes on this machine's CPU."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))

    def write(content: str) -> str:
        if "FSDP" in content:
            monkeypatch.setattr(launch, "MEMBER", "tests.stages.runtime.sharded_on_cpu")
        file = tmp_path / "accelerate.yaml"
        file.write_text(content)
        return str(file)

    return write


def distill(
    folder: Path, inputs: dict[str, Any], emit: Emit = lambda event: None, config: str | None = None, **params: Any
) -> DenseCheckpoint:
    execution = {"device": "cpu", "micro_batch_size": 1, "checkpoint_minutes": 0, "accelerate_config": config}
    folder.mkdir(exist_ok=True)
    made: DenseCheckpoint = Distill.from_dict(PARAMS | params, execution).run(Context(folder, emit), **inputs)
    return made


def largest_difference(one: DenseCheckpoint, other: DenseCheckpoint) -> float:
    mine, theirs = TensorReader(one.path), TensorReader(other.path)
    assert mine.table.keys() == theirs.table.keys()
    return max(float((mine.read(name) - theirs.read(name)).abs().max()) for name in mine.table)


def of_kind(events: list[dict[str, Any]], kind: str) -> list[Any]:
    return [{name: value for name, value in event.items() if name != "event"} for event in events if event["event"] == kind]


def test_two_processes_train_what_one_does(tmp_path: Path, inputs: dict[str, Any], several: Callable[[str], str]) -> None:
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    one = distill(tmp_path / "one", inputs, alone.append, compute_dtype="fp32")
    two = distill(tmp_path / "two", inputs, together.append, several(COPIES), compute_dtype="fp32")
    assert largest_difference(one, two) < 1e-5 < 1e-3 < largest_difference(one, inputs["student"])
    assert {file.name for file in two.path.iterdir()} == {file.name for file in one.path.iterdir()}
    for kind in ("progress", "note"):
        assert of_kind(together, kind) == of_kind(alone, kind)
    for mine, its in zip(of_kind(alone, "curve"), of_kind(together, "curve"), strict=True):
        assert its["metrics"] == pytest.approx(mine["metrics"], rel=1e-5) and its["step"] == mine["step"]
    assert two.metrics["train_loss"] == pytest.approx(one.metrics["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_sharded_weights_compute_in_bf16_as_whole_ones_do(tmp_path: Path, inputs: dict[str, Any], several: Callable[[str], str]) -> None:
    student = DenseCheckpoint(make_checkpoint(tmp_path / "bf16", num_hidden_layers=2))
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    distill(tmp_path / "one", inputs | {"student": student}, alone.append)
    distill(tmp_path / "two", inputs | {"student": student}, together.append, several(SHARDS))
    curves = [[point["metrics"]["loss"] for point in of_kind(events, "curve")] for events in (alone, together)]
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-6)  # later the gathered weights are rounded
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)


@pytest.mark.slow
def test_a_sharded_training_that_is_killed_continues_and_leaves_no_process(
    tmp_path: Path, inputs: dict[str, Any], several: Callable[[str], str]
) -> None:
    one = distill(tmp_path / "one", inputs, compute_dtype="fp32")
    config, folder = several(SHARDS), tmp_path / "killed"

    def die_at_the_third(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["label"] == "training" and event["done"] == 3:
            for process in processes_of(folder):
                process.suspend()  # it does not end by itself
            os.kill(os.getpid(), signal.SIGKILL)

    killed(lambda: distill(folder, inputs, die_at_the_third, config, compute_dtype="fp32"))
    toys.wait_until(lambda: not processes_of(folder))

    events: list[dict[str, Any]] = []
    made = distill(folder, inputs, events.append, config, compute_dtype="fp32")
    assert of_kind(events, "resumed")[0]["text"] in ("update 2 of 4", "update 3 of 4")
    assert largest_difference(one, made) < 1e-5
    assert {file.name for file in made.path.iterdir()} == {file.name for file in one.path.iterdir()}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Launcher and processes that work on a stage's output: their command lines name it."""
    named = psutil.process_iter(["cmdline"])
    return [process for process in named if any(str(folder) in word for word in process.info["cmdline"] or ())]


def test_the_sentence_of_the_process_at_fault_is_told(tmp_path: Path) -> None:
    assert "exit status 7; the log says why" in str(launch._failure(tmp_path, 7))
    for index, error in enumerate([("lost connection", False), ("CUDA out of memory", False), ("lost it too", False)]):
        file = tmp_path / f"error-{index}.json"
        file.write_text(json.dumps({"text": error[0], "input": error[1]}))
        os.utime(file, (index == 0, index == 0))
    assert isinstance(launch._failure(tmp_path, 1), RuntimeError) and str(launch._failure(tmp_path, 1)) == "CUDA out of memory"
    (tmp_path / "error-3.json").write_text(json.dumps({"text": "lower learning_rate", "input": True}))
    assert isinstance(launch._failure(tmp_path, 1), ValueError) and str(launch._failure(tmp_path, 1)) == "lower learning_rate"


def test_a_sharded_trainings_state_is_not_continued_by_one_process(tmp_path: Path, inputs: dict[str, Any]) -> None:
    (tmp_path / "training/checkpoint-4/optimizer_0").mkdir(parents=True)
    events: list[dict[str, Any]] = []
    distill(tmp_path, inputs, events.append)
    assert of_kind(events, "note")[0]["text"].startswith("the interrupted training is not continued: one was sharded over several devices")
    assert [event["done"] for event in of_kind(events, "progress") if event["label"] == "training"] == [1, 2, 3, 4]


def test_an_updates_samples_are_shared_equally() -> None:
    params = Distill.Params.model_validate({"num_samples": 20, "global_batch_size": 8})
    alone = update_batches(20, params, 8)
    shares = [update_batches(20, params, 3, share, 2) for share in (0, 1)]
    assert [[len(micro) for micro in share] for share in shares] == [[3, 1, 3, 1, 2]] * 2
    for update, first in zip(alone, (0, 2, 4), strict=True):
        assert sorted(update) == sorted(index for share in shares for micro in share[first : first + 2] for index in micro)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_processes: 2", ""), "is no configuration of accelerate (KeyError); write it with `accelerate config`"),
        (("num_processes: 2", "num_processes: 1"), "has distributed_type FSDP and 1 processes; write MULTI_GPU or FSDP, and 2 processes"),
        (("num_machines: 1", "num_machines: 2"), "has 2 machines; a stage runs on one, write num_machines: 1"),
        (("version: 2", "version: 1"), "has fsdp_config.fsdp_version 1; write fsdp_version: 2"),
        (("  fsdp_cpu_ram_efficient_loading: false\n", ""), "efficient_loading null; write fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(tmp_path: Path, inputs: dict[str, Any], change: tuple[str, str], message: str) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(SHARDS.replace(*change))
    stage = Distill.from_dict(PARAMS, {"accelerate_config": str(file)})
    with pytest.raises(ValueError) as refusal:
        stage.infer(**{port: given.spec for port, given in inputs.items()})
    assert str(refusal.value).startswith(f"execution.accelerate_config: {file} ") and message in str(refusal.value)


def test_a_plan_counts_what_each_process_holds(tmp_path: Path, inputs: dict[str, Any]) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(SHARDS)
    assert read_config(str(file)) == Processes(count=2, sharded=True)
    specs = {port: given.spec for port, given in inputs.items()}
    gpu = Target(name="gpu", gpus=1, memory=1 << 34)
    whole, part = (Distill.from_dict(PARAMS, {"accelerate_config": config}).memory(**specs, target=gpu) for config in (None, str(file)))
    state = "trained weights, their gradients and AdamW's moments"
    assert part.vram[state] == whole.vram[state] // 2 and part.vram["teacher"] == whole.vram["teacher"]
    with pytest.raises(
        ValueError, match=r"2 processes cannot share 15 samples, 4 in an update, equally; write a global_batch_size and num_"
    ):
        Distill.from_dict(PARAMS | {"num_samples": 15}, {"accelerate_config": str(file)}).infer(**specs)
    with pytest.raises(ValueError, match=r"execution\.accelerate_config: adapters are trained on one device; leave it out or write"):
        Distill.from_dict(PARAMS | {"method": "lora"}, {"accelerate_config": str(file)}).infer(**specs)
