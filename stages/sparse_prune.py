"""Unstructured and 2:4 pruning: single weights of the decoder's Linear layers go to zero, and every shape stays as it is.

The checkpoint is stored dense: zeros are ordinary numbers in it, so by itself it is neither smaller nor faster. What the stages after
it make of the model keeps the zeros, and every checkpoint that they make is measured for it (`sparsity` among its metrics).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES
from pipeline.layout import Sparsity
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.sparsity_settings import SHARED_INPUTS, described
from stages.runtime.stage_work import forward_flops, publishing, reading, tokenizing
from stages.runtime.sweep_memory import HIDDEN_STATES, sweep_memory
from stages.runtime.training_settings import check_windows

SELECTED = 30e6  # weights a second that one core scores and masks, measured: unstructured; 2:4 is three times as fast
USED_BY = {
    "num_samples": ("wanda", "sparsegpt"),
    "max_length": ("wanda", "sparsegpt"),
    "dampening_frac": ("sparsegpt",),
    "block_size": ("sparsegpt",),
}


class SparsePrune(Stage):
    """Put single weights to zero: the smallest (`magnitude`), the smallest times the norm of their input (`wanda`, Sun et al., 2023,
    https://arxiv.org/abs/2306.11695), or those whose loss the other weights can make good best (`sparsegpt`, Frantar & Alistarh, 2023,
    https://arxiv.org/abs/2301.00774).

    Every Linear layer of the decoder gets the same share; embeddings, norms, routers and lm_head stay dense. `wanda` and `sparsegpt`
    take the layers one by one, each calibrated on what the pruned ones before it compute; the model is never in memory.

    `sparsity` is of the weights that are left: a second round of 0.5 leaves a quarter of the weights, as rounds of iterative pruning
    do (Frankle & Carbin, 2019, https://arxiv.org/abs/1803.03635). What is zero stays zero. Of a source model nothing is known until
    its weights are read: its zeros count as the first to go, so that magnitude pruning at the sparsity that it has changes nothing
    and lets the stages after it know.
    """

    name, version = "sparse_prune", 1
    libraries = ("torch", "transformers")
    lightens = {"num_samples": HALVES}

    class Params(Computing, Stage.Params):
        method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
        pattern: Literal["unstructured", "2:4"] = "unstructured"  # 2:4: of any four consecutive inputs of a neuron, two go
        sparsity: float = Field(default=0.5, gt=0, lt=1)  # of each weight matrix, what goes of what is left
        num_samples: int = Field(default=128, ge=1)  # calibration windows ...
        max_length: int = Field(default=256, ge=2)  # ... and their tokens; 2048 is usual for models of a billion weights and more
        dampening_frac: float = Field(default=0.01, ge=0)  # of the Hessian's mean diagonal, added to its diagonal
        block_size: int = Field(default=128, ge=1)  # columns that share a threshold, and between two corrections of all columns to come

        @field_validator("pattern", mode="before")
        @classmethod
        def _is_no_number(cls, pattern: Any) -> Any:
            if pattern == 124:
                raise ValueError("YAML reads 2:4 as the number 124 (2 * 60 + 4); write it in quotes, '2:4'")
            return pattern

        @property
        def calibrates(self) -> bool:
            return self.method != "magnitude"

    class Execution(Stage.Execution):
        device: Literal["auto", "cpu", "cuda"] = "auto"  # of the calibration

    params: Params
    execution: Execution

    @property
    def computes(self) -> bool:
        return self.params.calibrates

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.calibrates else frozenset({"calibration"})

    def on_gpu(self, target: Target) -> bool:
        return self.params.calibrates and super().on_gpu(target)

    def infer(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> ModelSpec:
        problems = without_effect(self.params, self.execution.device) + misfits(self.params, model)
        if problems:
            raise InputProblems(problems)
        if calibration is not None:
            check_windows(self.params.num_samples, self.params.max_length, calibration, model)
        return model.with_sparsity(sparsity_after(self.params, model))

    def explain(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> list[str]:
        pruned = self.infer(model, calibration)
        zeros = sum(group.count * pruned.sparsity.zeros(group.shape) for group in pruned.sparse_groups if pruned.sparsity)
        share = (
            f"sparsity: {described(pruned)} in every Linear layer of the decoder, {zeros:,} of the model's {model.num_parameters:,} weights"
        )
        said = [share + (f"; it had {described(model)}" if model.sparsity else "")]
        said.append("stored dense: the bytes stay, and dense kernels gain nothing from zeros")
        if pruned.sparsity and pruned.sparsity.pattern == "2:4":
            said.append(
                "pattern 2:4: sparse tensor cores (NVIDIA A100, H100 and later) have twice the peak rate for these matrices and hold them "
                "in 0.5625 of their bytes (16-bit values, 2 bits of position each), once an engine has converted them"
            )
        return said

    def memory(self, model: ModelSpec, target: Target, calibration: DatasetSpec | None = None) -> Memory:
        """Beyond the interpreter and its libraries, while the largest weight is pruned."""
        p, item = self.params, ITEM_BYTES[model.dtype]
        shapes, disk = [group.shape for group in model.sparse_groups], {"checkpoint": model.nbytes}
        largest = max(math.prod(shape) for shape in shapes)
        if not p.calibrates:
            return Memory(ram={"one weight": item * largest, "its scores, sorted, and its mask": 24 * largest}, disk=disk)
        sweep = sweep_memory(p.in_memory(model), p.num_samples, p.max_length)
        columns = shared_columns(model)
        if p.method == "wanda":
            pruning = {"norms of a layer's inputs": 4 * sum(columns), "scores of one weight, sorted, and its mask": 24 * largest}
        else:
            pruning = {
                "Hessians of a layer's inputs": sum(4 * c * c for c in columns),
                "a copy of one Hessian": 4 * max(columns) ** 2,
                "copies of a weight, which malloc keeps": 16 * largest,  # measured
            }
        if self.on_gpu(target):
            kept = {HIDDEN_STATES: sweep.pop(HIDDEN_STATES), "one weight on its way to disk": item * largest}
            return Memory(ram=kept, vram=sweep | pruning, disk=disk)
        return Memory(ram=sweep | pruning, disk=disk)

    def work(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> Work:
        """Each layer runs twice, to gather its inputs and to hand on what the pruned one computes. In float32, for `sparsegpt`: the
        Hessians, their factors, and the columns to come corrected after each; within a block each column corrects the rest of it."""
        p, groups = self.params, model.sparse_groups
        weights = sum(group.num_parameters for group in groups)
        streamed = reading(model) + publishing(model.with_sparsity(sparsity_after(p, model)))
        if calibration is None:
            return streamed + Work(cpu=weights / SELECTED)
        tokens = p.num_samples * p.max_length
        swept = p.products(2 * forward_flops(model, tokens, p.max_length, head=False)) + tokenizing(calibration) + streamed
        if p.method == "wanda":
            return swept + Work(nbytes=20 * weights)
        layers = model.architecture.num_layers
        flops = layers * sum(2 * tokens * c**2 + 4 / 3 * c**3 for c in shared_columns(model))
        flops += sum(group.count * group.shape[0] * group.shape[1] ** 2 for group in groups)
        nbytes = sum(group.count * math.prod(group.shape) * 16 * min(p.block_size, group.shape[1]) / 2 for group in groups)
        return swept + Work(float32_flops=flops, nbytes=nbytes)

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset | None = None) -> DenseCheckpoint:
        from stages.runtime.sparsifying import prune_by_magnitude
        from stages.runtime.tensors import TensorReader, copy_companions

        p, source = self.params, model.model_spec
        problems = source.differences(TensorReader(model.path).table)
        if problems:
            raise ValueError(f"{model.path} is not the model its config.json describes: {'; '.join(problems[:5])}")
        spec = source.with_sparsity(sparsity_after(p, source))
        if calibration is None:
            prune_by_magnitude(model.path, ctx.output, spec, counting(p, spec), partial(ctx.progress, "pruning"))
        else:
            self._prune_calibrated(ctx, model, spec, calibration)
        copy_companions(model.path, ctx.output, model.config)
        return DenseCheckpoint(ctx.output, spec)

    def _prune_calibrated(self, ctx: Context, model: DenseCheckpoint, spec: ModelSpec, calibration: Dataset) -> None:
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.sparsifying import prune_calibrated, sparse_gpt, wanda
        from stages.runtime.text import calibration_windows, load_tokenizer

        p, count = self.params, counting(self.params, spec)
        method = wanda(count) if p.method == "wanda" else sparse_gpt(count, p.block_size, p.dampening_frac)
        windows = calibration_windows(calibration, load_tokenizer(model.path), p.num_samples, p.max_length)
        device, dtype = resolve_device(self.execution.device), COMPUTE_DTYPES[p.computes_in]
        prune_calibrated(model.path, ctx.output, windows, device, dtype, method, partial(ctx.progress, "pruning"))


def sparsity_after(p: SparsePrune.Params, model: ModelSpec) -> Sparsity:
    """What is known of a model's zeros once it is pruned: those of before stay."""
    known = model.sparsity or Sparsity(share=0)
    if p.pattern == "2:4":
        return Sparsity(share=max(0.5, known.share), pattern="2:4")
    return Sparsity(share=1 - (1 - known.share) * (1 - p.sparsity), pattern=known.pattern)


def counting(p: SparsePrune.Params, pruned: ModelSpec) -> Callable[[tuple[int, ...]], int | None]:
    """How many weights of a [rows, columns] matrix are to be zero; None: what the pattern says."""
    return lambda shape: None if p.pattern == "2:4" or pruned.sparsity is None else pruned.sparsity.zeros(shape)


def without_effect(p: SparsePrune.Params, device: str) -> list[str]:
    """Settings that contradict others or change nothing, a sentence each."""
    changed = p.model_dump(exclude_defaults=True)
    problems = [
        f"{name}: it has an effect only with method: {' or '.join(methods)}; leave it out"
        for name, methods in USED_BY.items()
        if name in changed and p.method not in methods
    ]
    if p.pattern == "2:4" and p.sparsity != 0.5:
        problems.append(f"sparsity: 2:4 removes half of the weights, not {p.sparsity:g}; leave it out, or write pattern: unstructured")
    if p.pattern == "2:4" and p.method == "sparsegpt" and p.block_size % 4:
        problems.append(
            f"block_size: with 2:4 a block is whole groups of four columns; write {p.block_size // 4 * 4 + 4} in place of {p.block_size}"
        )
    if device != "auto" and not p.calibrates:
        problems.append("execution.device: only a calibration computes on it; leave it out, or write method: sparsegpt or wanda")
    return problems


def misfits(p: SparsePrune.Params, model: ModelSpec) -> list[str]:
    """Why that model cannot be pruned so."""
    problems, known = [], model.sparsity or Sparsity(share=0)
    if p.calibrates and model.architecture.experts:
        problems.append(f"method: {p.method} does not calibrate mixtures of experts yet; write method: magnitude")
    if p.pattern == "2:4":
        odd = [f"{group.pattern} ({group.shape[1]})" for group in model.sparse_groups if group.shape[1] % 4]
        if known.pattern == "2:4":
            problems.append("pattern: the model is 2:4 already; take the stage out of the order, or write pattern: unstructured")
        elif odd:
            problems.append(f"pattern: 2:4 needs columns in fours, unlike those of {', '.join(odd)}; write pattern: unstructured")
    else:
        pruned = sparsity_after(p, model)
        few = [group for group in model.sparse_groups if pruned.zeros(group.shape) == known.zeros(group.shape)]
        if few:
            problems.append(
                f"sparsity: {p.sparsity:g} of what is left of a row of {few[0].pattern} ({few[0].shape[1]} columns) is less than one "
                "weight; write a larger one"
            )
    return problems


def shared_columns(model: ModelSpec) -> list[int]:
    """Columns of each input of a decoder layer that is looked at; Linear layers that read the same are looked at once."""
    width = {group.name.removeprefix("model.layers.{layer}."): group.shape[1] for group in model.sparse_groups}
    return [width[names[0]] for names in SHARED_INPUTS]
