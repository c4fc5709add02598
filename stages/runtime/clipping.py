"""The range of each group that rounds with the least error: extreme weights are clipped where that lets all others fall on a finer grid.

llm-compressor's search (its `memoryless_mse` observer), value for value: the range is shrunk in steps of 1 %, by up to `maxshrink`, and of
each group the range is kept whose error, the sum of |rounded - weight|^2.4, is least. The search ends early after 5 steps that improve no
group of the matrix. Errors are in the weights' own dtype, as there. Unlike there, only a block of rows is rounded at a time.

The field calls it mse, although the power is 2.4: llm-compressor's default, and that of the code published with GPTQ.
"""

import torch
from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from pipeline.layout import WeightFormat
from stages.runtime.packing import min_max_parameters, row_blocks, scheme_of
from stages.runtime.scheme import GRID, Observer

PATIENCE, POWER = 5, 2.4


def group_parameters(weight: torch.Tensor, form: WeightFormat, observer: Observer) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group, [rows, groups], of a [rows, columns] weight, in its dtype."""
    return least_error_parameters(weight, form, observer.steps) if observer.steps else min_max_parameters(weight, form)


def least_error_parameters(weight: torch.Tensor, form: WeightFormat, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with as much of each group's range, of `steps` shares, as rounds with the least error."""
    args = scheme_of(form).weights
    assert args is not None, "a scheme of ours has weights"
    by_token = args.model_copy(update={"strategy": QuantizationStrategy.TOKEN})  # one scale for what is its last dimension
    groups = weight.reshape(len(weight), -1, form.group_size or weight.shape[1])
    least, most = groups.amin(-1), groups.amax(-1)
    best_least, best_most, idle = least.clone(), most.clone(), 0
    best_error = torch.full_like(least, torch.finfo(least.dtype).max)
    for step in range(steps):
        share, improves = 1 - step / GRID, False
        for rows in row_blocks(*weight.shape):
            low, high = least[rows] * share, most[rows] * share
            scale, zero = calculate_qparams(low, high, args)
            rounded = fake_quantize(groups[None, rows], scale.unsqueeze(-1), zero.unsqueeze(-1), by_token).to(weight.dtype)
            error = (rounded - groups[None, rows]).abs().pow(POWER).sum((0, -1))
            better = error < best_error[rows]
            for best, found in ((best_error, error), (best_least, low), (best_most, high)):
                best[rows][better] = found[better]
            improves = improves or bool(better.any())
        idle = 0 if improves else idle + 1
        if idle == PATIENCE:
            break
    scale, zero_point = calculate_qparams(best_least, best_most, args)
    return scale, zero_point
