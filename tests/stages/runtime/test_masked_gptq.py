"""GPTQ that keeps zeros: the library's where there are none, and better than putting them back afterwards where there are."""

import pytest
import torch
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from pipeline.layout import WeightFormat
from stages.functional.sparsity import two_of_four
from stages.runtime.masked_gptq import quantize_masked
from stages.runtime.packing import min_max_parameters, scheme_of

ROWS, COLUMNS, TOKENS = 48, 96, 400


def inputs() -> torch.Tensor:
    """[2, tokens, columns], correlated as those of a layer are."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2, COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    correlated: torch.Tensor = torch.randn(2, TOKENS, COLUMNS, generator=generator) @ mixed
    return correlated


def weights() -> torch.Tensor:
    return torch.randn(2, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def quantize(function: object, weight: torch.Tensor, num_bits: int, symmetric: bool, actorder: str | None, block_size: int) -> torch.Tensor:
    form, x = WeightFormat(num_bits=num_bits, group_size=32, symmetric=symmetric), inputs()
    scales, points = zip(*(min_max_parameters(one, form) for one in weight), strict=True)
    arguments = scheme_of(form, actorder).weights
    assert callable(function)
    rounded, _, fallbacks = function(
        weight.clone(), x.mT @ x, torch.stack(scales), torch.stack(points), None, arguments, block_size, 0.01
    )  # fmt: skip
    assert not fallbacks.any()
    result: torch.Tensor = rounded
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", [None, "static", "weight"])
def test_without_zeros_it_is_the_librarys(actorder: str | None, symmetric: bool) -> None:
    ours, theirs = (quantize(f, weights(), 4, symmetric, actorder, block_size=20) for f in (quantize_masked, quantize_weight))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("actorder", [None, "static"])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_zeros_stay_and_cost_less_than_putting_them_back_afterwards(num_bits: int, actorder: str | None, symmetric: bool) -> None:
    weight = weights()
    zeros = torch.stack([two_of_four(one.abs()) for one in weight])
    weight = weight.masked_fill(zeros, 0)
    kept = quantize(quantize_masked, weight, num_bits, symmetric, actorder, block_size=32)
    library = quantize(quantize_weight, weight, num_bits, symmetric, actorder, block_size=32)
    assert bool((kept[zeros] == 0).all())
    assert bool((library[zeros] != 0).any()), "the control: its corrections move zeros"

    def error(rounded: torch.Tensor) -> float:
        return float((inputs() @ (rounded - weight).mT).square().sum())

    assert error(kept) < error(library.masked_fill(zeros, 0))
