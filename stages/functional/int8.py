"""Symmetric INT8: a value is one of the integers -127 .. 127 times a scale. Example: with scale 0.5, 3.3 is 7 and comes back as 3.5.

-128 is left out so that the range is the same on both sides and no zero point is needed. An error is at most half a scale for
values within 127 scales of zero; others are cut off there.
"""

import torch

LARGEST = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a vector of zeros, whose quotient must be 0 and not nan


def absmax_scale(values: torch.Tensor) -> torch.Tensor:
    """The fp32 scale of each vector along the last dimension [..., n] -> [..., 1] with which its largest magnitude becomes 127.

    nan and inf reach the scale, and by it every value of the vector when it is dequantized: they are never hidden.
    """
    return (values.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(SMALLEST_SCALE)


def quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to the nearest integer (ties to even) and cut off at 127: [..., n] -> int8 [..., n]. `scale` is fp32 and broadcasts."""
    return (values.float() / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., n] times its scale, multiplied in fp32 and rounded once, to `dtype`."""
    return values.float().mul_(scale).to(dtype)
