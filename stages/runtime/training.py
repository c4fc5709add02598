"""The training loop: transformers' Trainer, made to keep the promises of this project.

- The loss is the mean over the counted tokens of a whole global batch, however that is split into micro batches.
- A checkpoint holds only what is trained, and gets its name by a rename once it is whole: what a kill cut short has no name that
  anyone resumes from. Its pickles are the loop's own and are read with `weights_only`.
- A loss or gradient that is not finite ends the training before it reaches a weight.
- Nothing is printed or tracked but through the stage's Context, and several visible GPUs do not become DataParallel.
- Several processes (stages/runtime/launch.py) share each update's samples equally, and so make the update that one would make.

What is trained is a module whose forward takes a batch and computes the loss, so that wrappers for several devices fit around it.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.stage import Context
from stages.runtime.processes import as_main_says, average, is_sharded, num_processes, process_index, wait_for_everyone
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
    sparse: Collection[str] = (),
) -> dict[str, float]:
    """Train in place those parameters of `module` that require a gradient; it stands on its device already.

    `module(**batch)` returns {"loss": the SUM over the micro batch's counted tokens, float32 scalar, and any further such sums, which
    become curves}; a batch has "labels" [samples, length], aligned with the logits (labels[t] is the target of position t), -100 where
    none counts. `samples` has a length. Of the parameters named in `sparse` only what is not zero is trained. The caller has switched
    gradient checkpointing on, and removes `work` at the end.

    Continues from the last checkpoint in `work`, the module being as it was at the first start. Returns `train_loss` (mean loss per
    counted token over the last tenth of the curve), `first_train_loss` (of the first update), and of all attempts together, without
    what an interruption lost, `train_seconds` and `tokens_per_second` (padding counted). ValueError where the loss or the gradient is
    not finite.
    """
    count: int = len(samples)  # type: ignore[arg-type]
    batches = update_batches(count, params, execution.micro_batch_size, process_index(), num_processes())
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=collate)
    found = _checkpoints(ctx, work)
    trainer = _Trainer(ctx, module, _arguments(params, execution, work), loader, execution.checkpoint_minutes * 60, frozenset(sparse))
    if found:
        ctx.resumed(f"update {_step_of(found[-1])} of {params.steps}")
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    curve = [row for row in trainer.state.log_history if "loss" in row]
    last = curve[-max(1, len(curve) // 10) :]
    seconds = math.fsum(row["seconds"] for row in curve)
    return {
        "train_loss": math.fsum(row["loss"] for row in last) / len(last),
        "first_train_loss": curve[0]["loss"],
        "train_seconds": seconds,
        "tokens_per_second": sum(row["tokens"] for row in curve) / seconds,
    }


def update_batches(count: int, params: TrainingParams, micro_batch_size: int, share: int = 0, shares: int = 1) -> list[list[int]]:
    """The micro batches of all updates: each epoch's random order one after the other, cut into global batches, these cut again.

    Of `shares` processes each gets its own samples of a global batch, as many micro batches as any other where all can be shared
    equally.
    """
    generator = torch.Generator().manual_seed(params.seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(params.epochs)])
    updates = torch.split(order, params.global_batch_size)
    return [micro.tolist() for update in updates for micro in torch.split(update[share::shares], micro_batch_size)]


def _checkpoints(ctx: Context, work: Path) -> list[Path]:
    """Those in `work` that can be continued from, the last one last. A sharded training has others than one that is not."""
    found = sorted(work.glob("checkpoint-*"), key=_step_of)
    usable = [checkpoint for checkpoint in found if (checkpoint / WEIGHTS).is_file() != is_sharded()]
    if process_index() == 0:
        shutil.rmtree(work / "partial", ignore_errors=True)
    if found and not usable:
        ctx.note("the interrupted training is not continued: one was sharded over several devices, the other is not; it starts again")
        wait_for_everyone()
        for checkpoint in found if process_index() == 0 else ():
            shutil.rmtree(checkpoint)
    return usable


def _arguments(params: TrainingParams, execution: TrainingExecution, work: Path) -> TrainingArguments:
    share = params.global_batch_size // num_processes()
    micro = min(execution.micro_batch_size, share)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=1,  # the loader holds the batches of all epochs
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=math.ceil(share / micro),
        learning_rate=params.learning_rate,
        lr_scheduler_type=SCHEDULERS[params.lr_scheduler_type],
        warmup_steps=params.warmup_ratio,  # below 1 it is a ratio
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        bf16=params.computes_in == "bf16",
        use_cpu=execution.device == "cpu" or not torch.accelerator.is_available(),
        seed=params.seed,
        logging_steps=math.ceil(params.steps / CURVE_POINTS),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # by time instead: see _Trainer
        save_total_limit=1,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": is_sharded()}},  # or whole gradients would accumulate
        ddp_find_unused_parameters=False,
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
        self,
        ctx: Context,
        module: torch.nn.Module,
        arguments: TrainingArguments,
        loader: torch.utils.data.DataLoader[Any],
        pause: float,
        sparse: frozenset[str],
    ) -> None:
        super().__init__(module, arguments, train_dataset=loader.dataset, callbacks=[_Clock(ctx, pause)])
        self.remove_callback(PrinterCallback)
        self._set_precision()
        self.model_accepts_loss_kwargs = True  # makes it count the labels of a global batch, and not divide by the micro batches
        self.ctx, self.loader, self.sparse = ctx, loader, sparse
        self.since, self.positions = time.monotonic(), 0  # the last log or the start, and the tokens computed after it
        self.sums: dict[str, Any] = {}  # curves beside the loss, summed over ...
        self.updates = 0  # ... the updates since the last log

    def _set_precision(self) -> None:
        """Of sharded weights: gathered in the dtype of the computation, which is what autocast makes of whole ones; gradients added in
        float32."""
        if is_sharded() and not self.is_fsdp_enabled:
            raise ValueError("execution.accelerate_config: FSDP is for GPUs, and there is none; write distributed_type: MULTI_GPU")
        if is_sharded() and self.args.bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self.loader

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The micro batch's part of the global batch's mean."""
        assert num_items_in_batch is not None and not return_outputs, "training only"
        self.positions += inputs["labels"].numel()
        count = num_items_in_batch.clamp(min=1)  # in all processes, which average their gradients
        with self.accelerator.autocast() if is_sharded() else nullcontext():  # accelerate gives it to every model but a sharded one
            sums = model(**inputs)
        means = {name: value * num_processes() / count for name, value in sums.items()}
        loss: torch.Tensor = means.pop("loss")
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Called before each update, where gradients are clipped."""
        self._keep_zeros()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once for each update, before it."""
        if grad_norm is None:  # nothing is clipped
            self._keep_zeros()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.updates += 1
        if not math.isfinite(norm) or not math.isfinite(self._tr_loss):
            raise ValueError(
                f"the training diverged at update {self.state.global_step + 1} of {self.state.max_steps}: its loss or gradient is not "
                f"finite at a learning rate of {self._get_learning_rate():.3g}; lower learning_rate or raise warmup_ratio"
            )
        return norm

    def _keep_zeros(self) -> None:
        """AdamW moves nothing whose gradient has always been zero: both moments stay zero, and decay takes a share of nothing. So the
        zeros are their own mask, and no copy of it is kept."""
        for name, value in self._trained().items():
            if name in self.sparse and value.grad is not None:
                value.grad.masked_fill_(value.detach() == 0, 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= average({name: float(total) / self.updates for name, total in self.sums.items()})
            self.sums, self.updates = {}, 0
            self.ctx.curve(self.state.global_step, **{name: value for name, value in logs.items() if name != "epoch"})
            now = time.monotonic()
            logs |= {"seconds": now - self.since, "tokens": self.positions * num_processes()}  # kept with the curve in every checkpoint
            self.since, self.positions = now, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write it under a name that nobody resumes from, then rename, then drop the one before."""
        super()._save_checkpoint(model, trial)
        wait_for_everyone()
        if process_index() == 0:
            self._publish(f"checkpoint-{self.state.global_step}")
        wait_for_everyone()

    def _publish(self, name: str) -> None:
        final, partial = Path(self.args.output_dir), Path(self.args.output_dir) / "partial"
        for file in (partial / name).rglob("*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.rename(partial / name, final / name)
        for older in final.glob("checkpoint-*"):
            if older.name != name:
                os.rename(older, partial / older.name)  # a kill during the removal leaves half a checkpoint under no name to resume from
                shutil.rmtree(partial / older.name)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, "partial")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only what is trained: the rest is where the caller has it from."""
        assert output_dir is not None, "its one caller gives it"
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous() for name, value in self._trained().items()}, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        if is_sharded():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self._trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{resume_from_checkpoint} is of another model; remove it")
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(saved[name])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Reports every update, and asks for a checkpoint when the last is `pause` seconds old, and at the end of so long a training.

    Only with a point of the curve, which is the mean since the one before: what had been added up between two would be lost.
    """

    def __init__(self, ctx: Context, pause: float) -> None:
        self.ctx, self.pause = ctx, pause
        self.started = self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.ctx.progress("training", state.global_step, state.max_steps)
        now, last = time.monotonic(), state.global_step == state.max_steps
        control.should_log |= last
        if control.should_log and as_main_says(now - (self.started if last else self.saved) >= self.pause):
            control.should_save, self.saved = True, now


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
