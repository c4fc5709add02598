"""llm-compressor's `oneshot` with its traps shut: what it draws at random, falls back to, or takes from the environment.

- `pipeline="sequential"` is named: the other one it may infer for itself quantizes with an empty Hessian and saves nan.
- Calibration batches come from a DataLoader in our order; its own loader shuffles with the global random generator.
- Where a Hessian cannot be inverted it rounds to nearest and logs that; `GPTQWithReport` keeps the names.
- AWQ pins memory for an accelerator that need not be there, and goes on past a layer that computes nan; `StrictAWQ` does not.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.offload import set_onload_device, update_offload_parameter
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from pydantic import PrivateAttr
from torch.utils.data import DataLoader

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.compute_dtype import Computing
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.guard import check_probe
from stages.runtime.loading import COMPUTE_DTYPES
from stages.runtime.offloading import layers_keep_weights, model_in_ram, model_on_disk
from stages.runtime.packing import calibrated_packer, config_of, packed_formats, write_quantized
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, Windows
from stages.runtime.scoring import token_losses
from stages.runtime.tensors import DTYPES
from stages.runtime.text import calibration_windows, load_tokenizer


class GPTQWithReport(GPTQModifier):  # type: ignore[misc]  # the library has no types
    """GPTQModifier that remembers `fallbacks`, the layers it rounded to nearest: the library clears its list when it ends."""

    _fallbacks: list[str] = PrivateAttr(default_factory=list)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        self._fallbacks = list(self._rtn_fallback_module_names)
        return bool(super().on_finalize(state, **kwargs))

    @property
    def fallbacks(self) -> list[str]:
        return self._fallbacks


class UnpinnedCache(IntermediatesCache):  # type: ignore[misc]
    """Without an accelerator there is nothing to pin memory for, and torch refuses to."""

    def pin_memory(self, batch_index: int, input_names: list[str] | None = None) -> None:
        pass


class StrictAWQ(AWQModifier):  # type: ignore[misc]
    """AWQModifier that runs without an accelerator, compares losses in float32 and stops where it cannot compare them."""

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        caches: dict[Any, IntermediatesCache] = self._parent_args_cache
        if not torch.accelerator.is_available():
            caches.update({module: UnpinnedCache(None, self.offload_device) for module in caches})

    def _compute_loss(self, dense: list[torch.Tensor], rounded: list[torch.Tensor]) -> float:
        """Mean squared error over all batches. The library rounds the sum of each batch to the outputs' own dtype: in bf16 the
        choice between two scales would then depend on the batch size."""
        errors = ((one.float() - other.float()).square().sum().item() for one, other in zip(dense, rounded, strict=True))
        return float(sum(errors)) / sum(one.numel() for one in dense)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        searched = {row["layer_name"] for row in self._error_metrics}
        skipped = [mapping.parent_name for mapping in self._resolved_mappings if mapping.smooth_name not in searched]
        if skipped:
            raise ValueError(
                f"{skipped[0]} computes nan or inf on the calibration text ({len(skipped)} modules do or were not reached); "
                "evaluate this model before quantizing it"
            )
        return bool(super().on_finalize(state, **kwargs))


def run_oneshot(
    model: Any,
    tokenizer: Any,
    recipe: Sequence[Modifier],
    windows: torch.Tensor,
    batch_size: int,
    ctx: Context,
    searched: Mapping[str, int] | None = None,
) -> None:
    """Apply the modifiers of `recipe` to `model`, in place, calibrated on `windows` [samples, length].

    The library moves one layer at a time to the accelerator, where there is one; afterwards the model computes on the CPU again.

    Every decoder layer sees every batch twice: once to gather its statistics, once to hand its output on. The modules of
    `searched`, and those of them that lie within, see every batch that many times more; progress counts these too.
    """
    searched = searched or {}
    batches: DataLoader[Any] = DataLoader([{"input_ids": window} for window in windows], batch_size=batch_size)  # type: ignore[arg-type]
    forwards = [(layer, 2) for layer in model.get_decoder().layers]
    for name in searched:
        more = sum(times for outer, times in searched.items() if f"{name}.".startswith(f"{outer}."))
        forwards.append((model.get_submodule(name), 2 + more))
    total, done = len(batches) * sum(count for _, count in forwards), itertools.count(1)
    hooks = [module.register_forward_hook(lambda *_: ctx.progress("calibrating", next(done), total)) for module, _ in forwards]
    try:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=list(recipe),
            dataset=batches,
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
            pipeline="sequential",
            clear_sparse_session=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    set_onload_device(model, torch.device("cpu"))


def round_as_stored(model: Any, spec: ModelSpec) -> None:
    """Every tensor that the checkpoint will hold dense, to the dtype that it will have there; `model` may compute in another."""
    packed, stored = packed_formats(spec), DTYPES[spec.dtype]
    for name in spec.dense().tensors():
        module, _, kind = name.rpartition(".")
        if module in packed and kind == "weight":
            continue
        value = tensor_of(model, name)
        rounded = value.to(stored).to(value.dtype)
        if not torch.equal(rounded, value):
            update_offload_parameter(model.get_submodule(module), kind, rounded)


def tensor_of(model: Any, name: str) -> torch.Tensor:
    """Not `get_parameter`: what is read from disk in another dtype than its file's is no Parameter."""
    module, _, kind = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(module), kind).detach()
    return tensor


def quantize_calibrated(
    ctx: Context,
    model: DenseCheckpoint,
    calibration: Dataset,
    params: CalibratedQuantization,
    execution: CalibrationExecution,
    recipe: Sequence[Modifier],
    actorder: str | None = None,
    searched: Mapping[str, int] | None = None,
    spec: ModelSpec | None = None,
) -> QuantizedCheckpoint:
    """Apply `recipe` to `model` as `calibrate` does, and write it packed as `params` say, or as `spec` where layers differ."""
    source = model.model_spec
    spec = spec or params.apply(source)
    quantization = config_of(spec, params.ignored_names(source), actorder, params.ranges)
    return calibrate(ctx, model, calibration, params, params, execution, recipe, spec, quantization, searched)


def calibrate(
    ctx: Context,
    model: DenseCheckpoint,
    calibration: Dataset,
    params: Windows,
    computing: Computing,
    execution: CalibrationExecution,
    recipe: Sequence[Modifier],
    spec: ModelSpec,
    quantization: dict[str, Any],
    searched: Mapping[str, int] | None = None,
) -> QuantizedCheckpoint:
    """Load `model`, apply `recipe`, write what came of it to `ctx.output` as `spec` says and prove that it reloads as the same model.

    Every tensor is the calibrated model's, the dense ones too: a modifier may have folded scales into norms. What is stored keeps its
    dtype, whatever `computing` says: values are rounded to it before the proof, which therefore compares like with like.
    """
    dtype = COMPUTE_DTYPES[computing.computes_in]
    tokenizer = load_tokenizer(model.path)
    windows = calibration_windows(calibration, tokenizer, params.num_samples, params.max_length)
    on_disk = execution.offload == "disk"
    with model_on_disk(model.path, ctx.output, dtype) if on_disk else model_in_ram(model.path, dtype) as calibrated:
        run_oneshot(calibrated, tokenizer, recipe, windows, execution.batch_size, ctx, searched)
        round_as_stored(calibrated, spec)
        with layers_keep_weights(calibrated):
            losses = token_losses(calibrated, windows[:1])
        stored = DTYPES[spec.dtype]
        pack = calibrated_packer(calibrated, packed_formats(spec), stored)
        write_quantized(ctx, model, spec, quantization, pack, lambda name: tensor_of(calibrated, name).to(stored))
    check_probe(losses, ctx.output, windows[:1], dtype, layerwise=on_disk)
    return QuantizedCheckpoint(path=ctx.output, spec=spec)
