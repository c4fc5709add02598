"""llm-compressor's `oneshot` with its traps shut: what it draws at random, falls back to, or takes from the environment.

- `pipeline="sequential"` is named: the other one it may infer for itself quantizes with an empty Hessian and saves nan.
- Calibration batches come from a DataLoader in our order; its own loader shuffles with the global random generator.
- Where a Hessian cannot be inverted it rounds to nearest and logs that; `GPTQWithReport` keeps the names.
"""

import itertools
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import PrivateAttr
from torch.utils.data import DataLoader

from pipeline.stage import Context


class GPTQWithReport(GPTQModifier):  # type: ignore[misc]  # the library has no types
    """GPTQModifier that remembers `fallbacks`, the layers it rounded to nearest: the library clears its list when it ends."""

    _fallbacks: list[str] = PrivateAttr(default_factory=list)

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        self._fallbacks = list(self._rtn_fallback_module_names)
        return bool(super().on_finalize(state, **kwargs))

    @property
    def fallbacks(self) -> list[str]:
        return self._fallbacks


def run_oneshot(model: Any, tokenizer: Any, modifier: Modifier, windows: torch.Tensor, batch_size: int, ctx: Context) -> None:
    """Apply `modifier` to `model`, a resident one on the CPU, in place, calibrated on `windows` [samples, length].

    The library moves one layer at a time to the accelerator, where there is one; afterwards the model is on the CPU again.

    Every decoder layer sees every batch twice: once to gather its statistics, once to hand its quantized output on.
    """
    layers = model.get_decoder().layers
    batches: DataLoader[Any] = DataLoader([{"input_ids": window} for window in windows], batch_size=batch_size)  # type: ignore[arg-type]
    total, done = 2 * len(layers) * len(batches), itertools.count(1)
    hooks = [layer.register_forward_hook(lambda *_: ctx.progress("calibrating", next(done), total)) for layer in layers]
    try:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=[modifier],
            dataset=batches,
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
            pipeline="sequential",
            clear_sparse_session=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    remove_dispatch(model)
