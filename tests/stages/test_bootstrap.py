"""The paired bootstrap: covers what it should, sees small differences because it pairs, and calls noise a tie."""

import math

import pytest
import torch

from stages.functional.bootstrap import Interval, paired_bootstrap


def losses(documents: int, shift: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Documents of very different difficulty; `a` is worse than `b` by `shift` a token, give or take `noise`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, 400, (documents,), generator=generator)
    b = tokens * (2 + torch.rand(documents, generator=generator))
    return b + tokens * (shift + noise * torch.randn(documents, generator=generator)), b, tokens


def test_the_interval_is_the_normal_one_where_documents_are_alike() -> None:
    a, b, _ = losses(400, shift=0.01, noise=0.05)
    tokens = torch.ones(400)
    difference = (a - b).double()
    error = difference.std() / math.sqrt(400)
    found = paired_bootstrap(a, b, tokens)
    assert found.estimate == pytest.approx(difference.mean().item())
    assert found.low == pytest.approx((difference.mean() - 1.96 * error).item(), abs=0.1 * error.item())
    assert found.high == pytest.approx((difference.mean() + 1.96 * error).item(), abs=0.1 * error.item())


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    intervals = (paired_bootstrap(*losses(60, 0.02, 0.1, seed), resamples=1000) for seed in range(200))
    covered = sum(found.low <= 0.02 <= found.high for found in intervals)
    assert 0.89 * 200 <= covered <= 0.99 * 200  # 95 % of 200 tries, give or take three standard errors and small-sample bias


def test_pairing_sees_a_difference_far_smaller_than_the_spread_of_documents() -> None:
    a, b, tokens = losses(50, shift=0.01, noise=0.005)
    paired = paired_bootstrap(a, b, tokens)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    unpaired = paired_bootstrap(a[shuffled] / tokens[shuffled] * tokens, b, tokens)
    assert not paired.is_tie
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_noise_is_a_tie_and_equal_models_differ_by_exactly_nothing() -> None:
    assert paired_bootstrap(*losses(50, shift=0.0, noise=0.05)).is_tie
    _, b, tokens = losses(50, 0.0, 0.0)
    assert paired_bootstrap(b, b, tokens) == Interval(0.0, 0.0, 0.0)


def test_the_seed_decides_the_draw_and_blocks_of_draws_do_not_need_to_divide() -> None:
    data = losses(50, 0.0, 0.05)
    assert paired_bootstrap(*data, seed=1) == paired_bootstrap(*data, seed=1) != paired_bootstrap(*data, seed=2)
    many = losses(3000, 0.02, 0.05)
    assert not paired_bootstrap(*many, resamples=1500).is_tie


def test_swapping_the_models_turns_the_interval_around() -> None:
    a, b, tokens = losses(50, 0.02, 0.05)
    there, back = paired_bootstrap(a, b, tokens), paired_bootstrap(b, a, tokens)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_percent_of_perplexity() -> None:
    percent = Interval(low=-0.01, high=math.log(2), estimate=math.log(1.5)).perplexity_change_pct
    assert (percent.high, percent.estimate) == pytest.approx((100, 50))
    assert percent.low == pytest.approx(100 * (math.exp(-0.01) - 1))
    assert percent.is_tie


def test_reports_on_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="same two or more documents"):
        paired_bootstrap(torch.ones(3), torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="same two or more documents"):
        paired_bootstrap(torch.ones(1), torch.ones(1), torch.ones(1))
