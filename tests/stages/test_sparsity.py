"""The masks are the papers': planted cases in which the methods must differ, and the reconstruction that each promises."""

import itertools

import pytest
import torch

from stages.functional.sparsity import (
    add_products,
    add_squares,
    inverse_factor,
    magnitude_mask,
    smallest,
    sparsegpt,
    two_of_four,
    wanda_mask,
)


def correlated_inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns, generator=generator)]
    inputs: torch.Tensor = torch.randn(tokens, columns, generator=generator) @ mixed * sizes
    return inputs


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms_of(inputs: torch.Tensor) -> torch.Tensor:
    return add_squares(None, inputs).sqrt()


def is_two_of_four(weight: torch.Tensor) -> bool:
    return bool((zeros_in_fours(weight) == 2).all())


def zeros_in_fours(weight: torch.Tensor) -> torch.Tensor:
    return (weight == 0).view(len(weight), -1, 4).sum(2)


def test_a_small_weight_of_a_loud_input_stays_with_wanda_and_goes_by_magnitude() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    norms = torch.tensor([100.0, 1.0, 1.0, 1.0])
    assert magnitude_mask(weight, 2).tolist() == [[True, True, False, False]]
    assert wanda_mask(weight, norms, 2).tolist() == [[False, True, True, False]]
    assert magnitude_mask(weight, None).tolist() == [[True, True, False, False]]
    assert wanda_mask(weight, norms, None).tolist() == [[False, True, True, False]]


def test_wanda_compares_within_a_row_and_magnitude_over_the_matrix() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert magnitude_mask(weight, 4).sum(1).tolist() == [4, 0]
    assert wanda_mask(weight, torch.ones(4), 2).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("count", [0, 1, 1000, 2047, 2048])
def test_exactly_as_many_go_as_are_asked_for_however_many_are_equal(count: int) -> None:
    scores = random_weight(32, 64).abs().round(decimals=1)  # about 40 values for 2048 weights
    mask = smallest(scores, count)
    assert int(mask.sum()) == count
    if 0 < count < 2048:
        assert scores[mask].max() <= scores[~mask].min()


def test_equal_scores_go_evenly_from_top_to_bottom() -> None:
    assert smallest(torch.ones(8, 16), 64).sum(1).tolist() == [8] * 8


@pytest.mark.parametrize("order", list(itertools.permutations([0.0, 1.0, 2.0, 3.0])))
def test_two_of_four_are_the_two_lowest(order: tuple[float, ...]) -> None:
    mask = two_of_four(torch.tensor([order]))
    assert mask.tolist() == [[score < 2 for score in order]]


def test_two_of_four_equal_ones_go_too() -> None:
    assert is_two_of_four((~two_of_four(torch.ones(3, 8))).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [32 * 48, None])
def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_better_than_magnitude(count: int | None, dtype: torch.dtype) -> None:
    inputs, weight = correlated_inputs(2000, 96), random_weight(32, 96, dtype)

    def error(pruned: torch.Tensor) -> float:
        assert int((pruned == 0).sum()) == 32 * 48 and (count is not None or is_two_of_four(pruned))
        return float((inputs @ (pruned.float() - weight.float()).T).square().sum())

    magnitude = error(weight.masked_fill(magnitude_mask(weight, count), 0))
    wanda = error(weight.masked_fill(wanda_mask(weight, norms_of(inputs), None if count is None else 48), 0))
    factor = inverse_factor(add_products(None, inputs), 0.01)
    corrected = error(sparsegpt(weight, factor, count, block_size=32).to(dtype))
    assert corrected < 0.7 * wanda and wanda < 0.7 * magnitude, (corrected, wanda, magnitude)


def test_sparsegpts_last_correction_is_the_least_squares_one() -> None:
    """One weight of a row goes; of those after it, the correction is the regression of its output on theirs."""
    inputs, weight = correlated_inputs(500, 8), torch.ones(1, 8)
    weight[0, 2] = 1e-6  # goes
    corrected = sparsegpt(weight, inverse_factor(add_products(None, inputs), 0.0), 1, block_size=8)
    target = inputs[:, 2:3] * weight[0, 2]
    expected = weight[0, 3:] + torch.linalg.lstsq(inputs[:, 3:], target).solution[:, 0]
    assert corrected[0, 2] == 0 and torch.equal(corrected[0, :2], weight[0, :2])
    torch.testing.assert_close(corrected[0, 3:] - 1, expected - 1, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("block_size", [4, 20, 96])
def test_blocks_share_what_goes(block_size: int) -> None:
    inputs, weight = correlated_inputs(500, 96), random_weight(16, 96)
    factor = inverse_factor(add_products(None, inputs), 0.01)
    pruned = sparsegpt(weight, factor, 700, block_size)
    assert int((pruned == 0).sum()) == 700
    for last in range(block_size, 96, block_size):
        assert int((pruned[:, :last] == 0).sum()) == 700 * last // 96
    assert is_two_of_four(sparsegpt(weight, factor, None, block_size))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("second", ["2:4", "more"])
def test_zeros_of_a_first_round_are_the_first_to_go(method: str, second: str) -> None:
    """Also where the first round took the weights that the second would have liked to keep."""
    inputs, weight = correlated_inputs(500, 64), random_weight(16, 64)
    loud = wanda_mask(weight, norms_of(inputs), 64 - 16)  # True for all but the 16 most important of each row
    weight = weight.masked_fill(~loud, 0)
    count = None if second == "2:4" else 16 * 32
    if method == "magnitude":
        pruned = weight.masked_fill(magnitude_mask(weight, count), 0)
    elif method == "wanda":
        pruned = weight.masked_fill(wanda_mask(weight, norms_of(inputs), None if count is None else 32), 0)
    else:
        pruned = sparsegpt(weight, inverse_factor(add_products(None, inputs), 0.01), count, block_size=16)
    assert bool((pruned[weight == 0] == 0).all())
    if count is not None:
        assert int((pruned == 0).sum()) == count
    else:
        assert bool((zeros_in_fours(pruned) >= 2).all())


def test_an_input_that_is_always_zero_does_not_stop_the_factorization() -> None:
    inputs = correlated_inputs(500, 16)
    inputs[:, 5] = 0
    pruned = sparsegpt(random_weight(4, 16), inverse_factor(add_products(None, inputs), 0.01), 32, block_size=16)
    assert pruned.isfinite().all() and bool((pruned[:, 5] == 0).all()), "what reads it is worth least"


def test_statistics_add_up_over_micro_batches() -> None:
    inputs = correlated_inputs(300, 8)
    products, squares = None, None
    for part in inputs.split(70):  # type: ignore[no-untyped-call]
        products, squares = add_products(products, part), add_squares(squares, part)
    assert products is not None and squares is not None
    torch.testing.assert_close(products, inputs.T @ inputs)
    torch.testing.assert_close(squares, products.diagonal())


def test_a_hessian_without_an_inverse_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is there
        inverse_factor(torch.ones(4, 4), 0.0)
