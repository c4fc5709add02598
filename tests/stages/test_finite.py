"""Bits say of every number of every dtype what isfinite says, and integers are never damaged."""

import pytest
import torch

from stages.functional.finite import SMALLEST, all_finite
from stages.runtime.tensors import DTYPES, as_bytes

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_numbers(bits: torch.Tensor, dtype: str) -> torch.Tensor:
    return bits.to(INTEGERS[DTYPES[dtype].itemsize]).view(DTYPES[dtype])


def corners(dtype: str) -> torch.Tensor:
    """Every number of 8 and of 16 bits; of wider ones those around the first that is not finite, and any, of both signs."""
    width = 8 * DTYPES[dtype].itemsize
    if width <= 16:
        return as_numbers(torch.arange(2**width), dtype)
    edge = SMALLEST[dtype] + torch.arange(-3, 4)
    bits = torch.cat([edge, edge + (-1 << (width - 1)), torch.randint(-(2**62), 2**62, (4000,))])
    return as_numbers(bits, dtype)


@pytest.mark.parametrize("dtype", sorted(SMALLEST))
def test_each_number_alone_and_among_others(dtype: str) -> None:
    numbers = corners(dtype)
    expected = numbers.double().isfinite()
    assert 0 < expected.sum() < len(expected)
    found = torch.tensor([all_finite(as_bytes(numbers[i : i + 1]), dtype) for i in range(len(numbers))])
    assert torch.equal(found, expected)
    finite = numbers[expected]
    assert all_finite(as_bytes(finite), dtype)
    for number in numbers[~expected][:50]:
        assert not all_finite(as_bytes(torch.cat([finite[:100], number[None], finite[100:]])), dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - SMALLEST.keys()))
def test_integers_are_finite_whatever_their_bits(dtype: str) -> None:
    assert all_finite(memoryview(b"\xff" * 64), dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_nothing_is_finite(dtype: str) -> None:
    assert all_finite(memoryview(b""), dtype)
