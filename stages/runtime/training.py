"""The training loop: transformers' Trainer, made to keep the promises of this project.

- The loss is the mean over the counted tokens of a whole global batch, however that is split into micro batches.
- A checkpoint holds only what is trained, and gets its name by a rename once it is whole: what a kill cut short has no name that
  anyone resumes from. Its pickles are the loop's own and are read with `weights_only`.
- A loss or gradient that is not finite ends the training before it reaches a weight.
- Nothing is printed or tracked but through the stage's Context, and several visible GPUs do not become DataParallel.

What is trained is a module whose forward takes a batch and computes the loss, so that wrappers for several devices fit around it.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.stage import Context
from stages.runtime.training_settings import TrainingExecution, TrainingParams

CURVE_POINTS = 500  # at most, however long the training
WEIGHTS = "model.safetensors"
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

Samples = torch.utils.data.Dataset[dict[str, torch.Tensor]]
Collate = Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]


def train(
    ctx: Context,
    module: torch.nn.Module,
    samples: Samples,
    collate: Collate,
    params: TrainingParams,
    execution: TrainingExecution,
    work: Path,
) -> dict[str, float]:
    """Train in place those parameters of `module` that require a gradient; it stands on its device already.

    `module(**batch)` returns {"loss": the SUM over the micro batch's counted tokens, float32 scalar, and any further such sums, which
    become curves}; a batch has "labels" [samples, length], aligned with the logits (labels[t] is the target of position t), -100 where
    none counts. `samples` has a length. The caller has switched gradient checkpointing on, and removes `work` at the end.

    Continues from the last checkpoint in `work`, the module being as it was at the first start. Returns `train_loss` (mean nats per
    counted token over the last tenth of the updates), `first_train_loss` (over the first logged ones), and of this attempt
    `train_seconds` and `tokens_per_second` (padding counted). ValueError where the loss or the gradient is not finite.
    """
    batches = update_batches(len(samples), params, execution.micro_batch_size)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=collate)
    shutil.rmtree(work / "partial", ignore_errors=True)
    found = sorted(work.glob("checkpoint-*"), key=_step_of)
    trainer = _Trainer(ctx, module, _arguments(params, execution, work), loader, execution.checkpoint_minutes * 60)
    if found:
        ctx.resumed(f"update {_step_of(found[-1])} of {params.steps}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    seconds = time.monotonic() - started
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "train_loss": math.fsum(last) / len(last),
        "first_train_loss": losses[0],
        "train_seconds": seconds,
        "tokens_per_second": trainer.positions / seconds,
    }


def update_batches(count: int, params: TrainingParams, micro_batch_size: int) -> list[list[int]]:
    """The micro batches of all updates: each epoch's random order one after the other, cut into global batches, these cut again."""
    generator = torch.Generator().manual_seed(params.seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(params.epochs)])
    return [micro.tolist() for batch in torch.split(order, params.global_batch_size) for micro in torch.split(batch, micro_batch_size)]


def _arguments(params: TrainingParams, execution: TrainingExecution, work: Path) -> TrainingArguments:
    micro = min(execution.micro_batch_size, params.global_batch_size)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=1,  # the loader holds the batches of all epochs
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=math.ceil(params.global_batch_size / micro),
        learning_rate=params.learning_rate,
        lr_scheduler_type=SCHEDULERS[params.lr_scheduler_type],
        warmup_steps=params.warmup_ratio,  # below 1 it is a ratio
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        bf16=params.dtype == "bf16",
        use_cpu=execution.device == "cpu" or not torch.accelerator.is_available(),
        seed=params.seed,
        logging_steps=math.ceil(params.steps / CURVE_POINTS),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # by time instead: see _Trainer
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:  # one process that sees several GPUs: Trainer would wrap the module in DataParallel
        arguments._n_gpu = 1
    return arguments


class _Trainer(Trainer):  # type: ignore[misc]  # the library has no types
    """Trainer with our loss, our loader, our checkpoints and our reports."""

    def __init__(
        self, ctx: Context, module: torch.nn.Module, arguments: TrainingArguments, loader: torch.utils.data.DataLoader[Any], pause: float
    ) -> None:
        super().__init__(module, arguments, train_dataset=loader.dataset, callbacks=[_Clock(ctx, pause)])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes it count the labels of a global batch, and not divide by the micro batches
        self.ctx, self.loader = ctx, loader
        self.positions = 0
        self.sums: dict[str, Any] = {}  # curves beside the loss, summed over ...
        self.updates = 0  # ... the updates since the last log

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The micro batch's part of the global batch's mean."""
        assert num_items_in_batch is not None and not return_outputs, "training only"
        self.positions += inputs["labels"].numel()
        means = {name: value / num_items_in_batch.clamp(min=1) for name, value in model(**inputs).items()}
        loss: torch.Tensor = means.pop("loss")
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once for each update, before it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.updates += 1
        if not math.isfinite(norm) or not math.isfinite(self._tr_loss):
            raise ValueError(
                f"the training diverged at update {self.state.global_step + 1} of {self.state.max_steps}: its loss or gradient is not "
                f"finite at a learning rate of {self._get_learning_rate():.3g}; lower learning_rate or raise warmup_ratio"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: float(total) / self.updates for name, total in self.sums.items()}
            self.sums, self.updates = {}, 0
            self.ctx.curve(self.state.global_step, **{name: value for name, value in logs.items() if name != "epoch"})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write it under a name that nobody resumes from, then rename, then drop the one before."""
        name = f"checkpoint-{self.state.global_step}"
        final, partial = Path(self.args.output_dir), Path(self.args.output_dir) / "partial"
        super()._save_checkpoint(model, trial)
        for file in (partial / name).iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        os.rename(partial / name, final / name)
        for older in final.glob("checkpoint-*"):
            if older.name != name:
                shutil.rmtree(older)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, "partial")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only what is trained: the rest is where the caller has it from."""
        assert output_dir is not None, "its one caller gives it"
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self._trained().items()}, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{resume_from_checkpoint} is of another model; remove it")
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(saved[name])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Reports every update, and asks for a checkpoint when the last is `pause` seconds old, and at the end of so long a training."""

    def __init__(self, ctx: Context, pause: float) -> None:
        self.ctx, self.pause = ctx, pause
        self.started = self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.ctx.progress("training", state.global_step, state.max_steps)
        now, last = time.monotonic(), state.global_step == state.max_steps
        control.should_log |= last
        if now - (self.started if last else self.saved) >= self.pause:
            control.should_save, self.saved = True, now


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
