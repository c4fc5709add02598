"""INT8 against the definition: nearest integer, symmetric range, an error of half a scale, and no nan that goes missing."""

import pytest
import torch

from stages.functional.int8 import LARGEST, absmax_scale, dequantize, quantize


def test_the_largest_magnitude_becomes_127_and_errors_are_half_a_scale_at_most() -> None:
    values = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    scale = absmax_scale(values)
    stored = quantize(values, scale)
    assert scale.shape == (2, 3, 5, 1) and scale.dtype == torch.float32 and stored.dtype == torch.int8
    assert (stored.abs().amax(-1) == LARGEST).all() and stored.min() >= -LARGEST
    assert ((dequantize(stored, scale, torch.float32) - values).abs() <= 0.5001 * scale).all()


def test_a_worked_example_rounds_ties_to_even_and_cuts_off() -> None:
    values, scale = torch.tensor([3.3, -1.25, 0.25, 100.0, -100.0]), torch.tensor([0.5])
    assert quantize(values, scale).tolist() == [7, -2, 0, 127, -127]
    assert dequantize(quantize(values, scale), scale, torch.bfloat16).tolist() == [3.5, -1.0, 0.0, 63.5, -63.5]


@pytest.mark.parametrize("value", [0.0, 1e-7, 65504.0], ids=["zero", "smallest", "largest"])
def test_the_ends_of_fp16_come_back(value: float) -> None:
    vector = torch.full((4,), value, dtype=torch.float16)
    scale = absmax_scale(vector)
    assert torch.equal(dequantize(quantize(vector, scale), scale, torch.float16), vector)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_not_hidden(broken: float) -> None:
    values = torch.ones(2, 8)
    values[1, 3] = broken
    scale = absmax_scale(values)
    back = dequantize(quantize(values, scale), scale, torch.float32)
    assert back[0].isfinite().all() and not back[1].isfinite().any()
