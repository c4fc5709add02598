"""The training loop: what an update is, that an interruption leaves no trace in the weights, and what stops it."""

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime import training
from stages.runtime.training import train, update_batches
from stages.runtime.training_settings import TrainingExecution, TrainingParams
from tests.stages.models import DIMENSIONS
from tests.stages.processes import killed

Sample = dict[str, torch.Tensor]


class Params(TrainingParams):
    learning_rate: float = 1e-2
    num_samples: int = 20
    max_length: int = 6
    global_batch_size: int = 4
    dtype: str = "fp32"  # type: ignore[assignment]


class Toy(torch.nn.Module):
    """A frozen embedding, dropout that draws from torch's generator, a trained head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(11, 8, generator=generator), requires_grad=False)
        self.head = torch.nn.Parameter(torch.randn(11, 8, generator=generator))
        self.bias = torch.nn.Parameter(torch.zeros(11))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Sample:
        logits = self.dropout(self.embedding[input_ids]) @ self.head.T + self.bias
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        return {"loss": loss, "twice": 2 * loss}


def samples(count: int = 20, length: int = 6) -> list[Sample]:
    """Of unlike numbers of counted tokens, so that a mean of means is not the mean."""
    ids = torch.randint(11, (count, length), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row.roll(-1).clone()} for row in ids]
    for number, row in enumerate(rows):
        row["labels"][: number % length] = -100
    return rows


def stack(rows: Sequence[Sample]) -> Sample:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fit(
    work: Path, module: torch.nn.Module, events: list[dict[str, Any]] | None = None, micro: int = 2, pause: float = 10, **params: Any
) -> dict[str, float]:
    execution = TrainingExecution(micro_batch_size=micro, checkpoint_minutes=pause, device="cpu")
    ctx = Context(work, (events if events is not None else []).append)
    return train(ctx, module, samples(), stack, Params(**params), execution, work)  # type: ignore[arg-type]


def test_the_micro_batch_only_splits_the_global_batch(tmp_path: Path) -> None:
    trained = []
    for micro in (1, 2, 3, 4, 9):
        module = Toy()
        fit(tmp_path / str(micro), module, micro=micro, epochs=2, weight_decay=0.1)
        trained.append(torch.cat([module.head.detach().flatten(), module.bias.detach()]))
    assert not torch.equal(trained[0], torch.cat([Toy().head.flatten(), Toy().bias]))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], atol=1e-6, rtol=0)


def test_an_update_is_adamw_on_the_mean_over_counted_tokens(tmp_path: Path) -> None:
    """Against a loop written out, clipping and schedule included."""
    module, expected = Toy(), Toy()
    params = Params(lr_scheduler_type="linear", warmup_ratio=0.25, max_grad_norm=0.1, weight_decay=0.5)
    fit(tmp_path, module, **params.model_dump(exclude_defaults=True))
    optimizer = torch.optim.AdamW(
        [{"params": [expected.head], "weight_decay": 0.5}, {"params": [expected.bias], "weight_decay": 0.0}], lr=params.learning_rate
    )
    for update, indices in enumerate(update_batches(20, params, 4)):
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * (update / 2 if update < 2 else (5 - update) / 3)
        batch = stack([samples()[index] for index in indices])
        (expected(**batch)["loss"] / (batch["labels"] != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(module.head, expected.head, atol=1e-6, rtol=0)
    torch.testing.assert_close(module.bias, expected.bias, atol=1e-6, rtol=0)


def test_samples_come_in_an_order_of_their_own_in_each_epoch() -> None:
    params = Params(num_samples=10, epochs=3, global_batch_size=4)
    whole, split = update_batches(10, params, 4), update_batches(10, params, 3)
    assert [len(batch) for batch in whole] == [4] * 7 + [2] and len(whole) == params.steps
    assert [len(batch) for batch in split] == [3, 1] * 7 + [2]
    order = [index for batch in whole for index in batch]
    assert order == [index for batch in split for index in batch]
    epochs = [order[first : first + 10] for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert update_batches(10, Params(num_samples=10, seed=1), 4) != update_batches(10, Params(num_samples=10), 4)


def test_it_reports_through_its_context_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []
    metrics = fit(tmp_path, Toy(), events, epochs=3)
    assert capfd.readouterr() == ("", "")
    progress = [(event["done"], event["total"]) for event in events if event["event"] == "progress"]
    curve = [event for event in events if event["event"] == "curve"]
    assert progress == [(step, 15) for step in range(1, 16)]
    assert [point["step"] for point in curve] == list(range(1, 16))
    for point in curve:
        assert point["metrics"]["twice"] == pytest.approx(2 * point["metrics"]["loss"])
    assert metrics["first_train_loss"] == curve[0]["metrics"]["loss"] > metrics["train_loss"]
    assert metrics["tokens_per_second"] == pytest.approx(60 * 6 / metrics["train_seconds"])
    assert not list(tmp_path.glob("checkpoint-*")), "a short training saves nothing"


def test_a_long_training_reports_a_bounded_number_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_POINTS", 4)
    events: list[dict[str, Any]] = []
    fit(tmp_path, Toy(), events, epochs=3)
    curve = [event for event in events if event["event"] == "curve"]
    assert [point["step"] for point in curve] == [1, 4, 8, 12, 15]
    every: list[dict[str, Any]] = []
    monkeypatch.setattr(training, "CURVE_POINTS", 100)
    fit(tmp_path, Toy(), every, epochs=3)
    losses = [event["metrics"]["twice"] for event in every if event["event"] == "curve"]
    assert curve[1]["metrics"]["twice"] == pytest.approx(math.fsum(losses[1:4]) / 3)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(value: Any, file: str) -> None:
    Path(file).write_bytes(b"half")
    die()


def train_and_die(work: Path, events: Callable[[dict[str, Any]], None], dropout: float = 0.5) -> None:
    """Train in a child process, saving at every point of the curve, that is killed as `events` arranges."""
    execution = TrainingExecution(micro_batch_size=2, checkpoint_minutes=0, device="cpu")
    killed(lambda: train(Context(work, events), Toy(dropout), samples(), stack, Params(epochs=3), execution, work))  # type: ignore[arg-type]


def at_update(update: int, then: Callable[[], None]) -> Callable[[dict[str, Any]], None]:
    return lambda event: then() if event["event"] == "progress" and event["done"] == update else None


@pytest.mark.parametrize(
    ("place", "whole"),
    [("between updates", 6), ("while the optimizer is written", 6), ("before the rename", 6), ("before the older one is removed", 7)],
)
def test_a_killed_training_continues_to_the_same_weights(tmp_path: Path, place: str, whole: int) -> None:
    unbroken = Toy(0.5)
    expected = fit(tmp_path / "unbroken", unbroken, epochs=3)
    patch = pytest.MonkeyPatch()  # used in the child only
    injected: dict[str, Callable[[], None]] = {
        "between updates": die,
        "while the optimizer is written": lambda: patch.setattr(torch, "save", half_a_file),
        "before the rename": lambda: patch.setattr(os, "rename", die),
        "before the older one is removed": lambda: patch.setattr(training.shutil, "rmtree", die),
    }
    work = tmp_path / "killed"
    train_and_die(work, at_update(7, injected[place]))

    events: list[dict[str, Any]] = []
    module = Toy(0.5)
    metrics = fit(work, module, events, epochs=3)

    assert [event["text"] for event in events if event["event"] == "resumed"] == [f"update {whole} of 15"]
    assert [event["done"] for event in events if event["event"] == "progress"] == list(range(whole + 1, 16))
    assert torch.equal(module.head, unbroken.head) and torch.equal(module.bias, unbroken.bias)
    assert (metrics["first_train_loss"], metrics["train_loss"]) == (expected["first_train_loss"], expected["train_loss"])


def test_a_continued_training_has_the_curve_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a point of it is the mean of several updates, and with another micro batch than before."""
    monkeypatch.setattr(training, "CURVE_POINTS", 4)
    whole, rest = [], []
    expected = fit(tmp_path / "unbroken", Toy(0.5), whole, epochs=3)
    train_and_die(tmp_path / "killed", at_update(7, die))
    found = fit(tmp_path / "killed", Toy(0.5), rest, epochs=3)
    assert [event["text"] for event in rest if event["event"] == "resumed"] == ["update 4 of 15"]
    unbroken, continued = ([(e["step"], e["metrics"]) for e in events if e["event"] == "curve"] for events in (whole, rest))
    assert [step for step, _ in unbroken] == [1, 4, 8, 12, 15] and continued == unbroken[2:]
    assert found["train_loss"] == expected["train_loss"]

    train_and_die(tmp_path / "other", at_update(7, die), dropout=0.0)
    exact, split = Toy(), Toy()
    fit(tmp_path / "exact", exact, epochs=3)
    fit(tmp_path / "other", split, epochs=3, micro=3)
    torch.testing.assert_close(split.head, exact.head, atol=1e-6, rtol=0)


def test_time_and_tokens_are_those_of_all_attempts(tmp_path: Path) -> None:
    train_and_die(tmp_path, at_update(12, die))
    started = time.monotonic()
    metrics = fit(tmp_path, Toy(0.5), epochs=3)
    assert metrics["train_seconds"] > time.monotonic() - started
    assert metrics["tokens_per_second"] * metrics["train_seconds"] == pytest.approx(60 * 6)


def test_a_training_killed_after_its_last_update_only_loads(tmp_path: Path) -> None:
    trained, loaded = Toy(), Toy()
    metrics = fit(tmp_path, trained, pause=0)
    assert fit(tmp_path, loaded) == metrics  # time and tokens too are those of the attempt that computed
    assert torch.equal(trained.head, loaded.head)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), pause=0)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-5"
    assert load_file(checkpoint / "model.safetensors").keys() == {"head", "bias"}
    assert {file.name for file in checkpoint.iterdir()} == {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip


def test_a_kill_while_an_older_checkpoint_is_removed_leaves_the_newer_to_continue_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, continued, events = Toy(), Toy(), []
    expected = fit(tmp_path / "unbroken", unbroken)

    def killed(folder: Path, **options: Any) -> None:
        if not options and (tmp_path / "killed/checkpoint-4").exists():
            (folder / "model.safetensors").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    remove = training.shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.shutil, "rmtree", killed)
        fit(tmp_path / "killed", Toy(), pause=0)
    found = fit(tmp_path / "killed", continued, events)
    assert [event["text"] for event in events if event["event"] == "resumed"] == ["update 4 of 5"]
    assert torch.equal(unbroken.head, continued.head) and found["train_loss"] == expected["train_loss"]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), pause=0)
    frozen = Toy()
    frozen.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"checkpoint-5 is of another model; remove it"):
        fit(tmp_path, frozen)


class Breaks(Toy):
    """Its loss is nan from the fourth update on."""

    calls = 0

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Sample:
        made = super().forward(input_ids, labels)
        self.calls += 1
        return made if self.calls < 4 else {"loss": made["loss"] * math.nan}


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_loss_that_is_not_finite_ends_it_before_it_reaches_a_weight(tmp_path: Path, max_grad_norm: float) -> None:
    module = Breaks()
    with pytest.raises(ValueError, match=r"diverged at update 4 of 5: .* learning rate of 0\.00\d+; lower learning_rate or raise warmup"):
        fit(tmp_path, module, micro=4, pause=0, max_grad_norm=max_grad_norm)
    assert module.head.isfinite().all()
    assert [checkpoint.name for checkpoint in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_bf16_is_the_dtype_of_the_computation_only(tmp_path: Path) -> None:
    exact, rounded = Toy(), Toy()
    fit(tmp_path / "fp32", exact)
    fit(tmp_path / "bf16", rounded, compute_dtype="bf16")
    assert rounded.head.dtype == torch.float32
    assert 0 < (rounded.head - exact.head).abs().max() < 0.02


@pytest.mark.gpu
def test_several_visible_gpus_are_one_device(tmp_path: Path) -> None:
    arguments = training._arguments(Params(), TrainingExecution(), tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4


def test_what_cannot_be_cut_from_the_text_is_refused_in_the_plan() -> None:
    model = ModelSpec.from_config({"model_type": "llama", **DIMENSIONS})
    text = DatasetSpec(split="train", digest="0", nbytes=10_000)
    params = Params(num_samples=100, max_length=100)
    params.check_data(text, model)
    with pytest.raises(
        ValueError, match=r"num_samples: 101 windows of 100 tokens need more text than the 10,000 bytes of train; write 100 "
    ):
        params.model_copy(update={"num_samples": 101}).check_data(text, model)
    with pytest.raises(ValueError, match=r"max_length: 257 is more than the model's 256 positions; write 256 or less"):
        params.model_copy(update={"max_length": 257}).check_data(text, model)
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainingParams.model_validate({})
