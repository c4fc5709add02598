"""GPTQ for sparse weights: what is zero is rounded to zero, whatever the corrections of the columns before have made of it.

llm-compressor's own loop knows no mask: corrections move zeros, and rounding keeps only the small moves at zero. Here a zero's share of
the corrections is an error like that of rounding, which the columns to come make good, as in SparseGPT's joint pruning and quantization
(Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774, section 3.5). Of weights without zeros it computes what the library does.
On a GPU it is the library's eager arithmetic and not its Triton kernel, which is faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy, fake_quantize
from llmcompressor.modifiers.gptq import base
from llmcompressor.modifiers.gptq.helpers import apply_activation_ordering, column_scale_window, factorize_hessian

from stages.runtime.oneshot import GPTQWithReport


class MaskedGPTQ(GPTQWithReport):
    """GPTQWithReport that keeps zeros."""

    def compress_module_list(self, module_list: Any) -> None:
        with masked_quantization():
            super().compress_module_list(module_list)


@contextmanager
def masked_quantization() -> Iterator[None]:
    """The library's modifier calls `quantize_masked` meanwhile."""
    original = base.quantize_weight
    base.quantize_weight = quantize_masked
    try:
        yield
    finally:
        base.quantize_weight = original


def quantize_masked(
    weights: torch.Tensor,
    hessians: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    global_scale: torch.Tensor | None,
    quant_args: QuantizationArgs,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the library's `quantize_weight`, for groups: weights [batch, rows, columns] and hessians [batch, columns, columns], which it
    overwrites, to (rounded weights, losses [batch], whether each was rounded to nearest for want of an inverse Hessian [batch])."""
    assert quant_args.strategy == QuantizationStrategy.GROUP, "the stage's formats are by group"
    dtype, columns = weights.dtype, weights.shape[2]
    weights, hessians, order = apply_activation_ordering(weights.float(), hessians.float(), quant_args.actorder)
    zeros, fallbacks = weights == 0, torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    factors = factorize_hessian(weights, hessians, percdamp, fallbacks)
    groups = torch.arange(columns, device=weights.device, dtype=torch.int) // quant_args.group_size
    if quant_args.actorder == ActivationOrdering.WEIGHT and order is not None:
        groups = groups.expand(len(weights), -1).gather(1, order)
    by_column = copy(quant_args)
    by_column.strategy = QuantizationStrategy.CHANNEL
    losses = torch.zeros(len(weights), device=weights.device)
    for first in range(0, columns, blocksize):
        last = min(first + blocksize, columns)
        scales, points = column_scale_window(
            scale, zero_point, global_scale, groups, quant_args, num_rows=weights.shape[1], i1=first, i2=last
        )  # fmt: skip
        block, factor = weights[:, :, first:last], factors[:, first:last, first:last]
        errors = torch.zeros_like(block)
        for i in range(last - first):
            column = block[:, :, i]
            point = None if points is None else points[:, :, i].T
            rounded = fake_quantize(column.T, scales[:, :, i].T, point, by_column).T.masked_fill(zeros[:, :, first + i], 0)
            errors[:, :, i] = (column - rounded) / factor[:, i, i, None]
            block[:, :, i:] -= errors[:, :, i, None] * factor[:, None, i, i:]
            block[:, :, i] = rounded
        losses += errors.square().sum((1, 2)) / 2
        weights[:, :, last:] -= errors @ factors[:, first:last, last:]
    if order is not None:
        inverse = order.argsort(-1)
        weights = weights.gather(-1, inverse.unsqueeze(1).expand(-1, weights.shape[1], -1))
    return weights.to(dtype), losses, fallbacks
