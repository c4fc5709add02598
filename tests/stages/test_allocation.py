"""The knapsack against every combination, and fast enough for the largest models."""

import itertools
import random

import pytest

from stages.functional.allocation import allocate, largest
from tests.yardsticks import import_seconds, work_seconds


def total(rows: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[choice] for row, choice in zip(rows, chosen, strict=True))


def every(sizes: list[list[int]], budget: int) -> list[tuple[int, ...]]:
    """All combinations within the budget."""
    combinations = itertools.product(*(range(len(row)) for row in sizes))
    return [chosen for chosen in combinations if total(sizes, chosen) <= budget]


def problem(seed: int) -> tuple[list[list[float]], list[list[int]], int]:
    """Up to seven units with two to four sizes; costs fall with the size, or by accident do not; some hardly differ."""
    draw = random.Random(seed)
    units, choices = draw.randint(1, 7), draw.randint(2, 4)
    sizes = [sorted(draw.sample(range(1, 60), choices)) for _ in range(units)]
    costs = [[draw.random() * draw.choice((2.0, 0.001)) for _ in range(choices)] for _ in range(units)]
    if seed % 2:
        costs = [sorted(row, reverse=True) for row in costs]
    return costs, sizes, draw.randint(sum(map(min, sizes)), sum(map(max, sizes)) + 3)


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 300, 50)], ids=str)
def test_no_combination_within_the_budget_costs_less(seeds: range) -> None:
    for seed in seeds:
        costs, sizes, budget = problem(seed)
        chosen = allocate(costs, sizes, budget)
        assert total(sizes, chosen) <= budget
        assert total(costs, chosen) == pytest.approx(min(total(costs, other) for other in every(sizes, budget)), rel=1e-5), seed


def test_no_combination_within_the_budget_is_larger() -> None:
    for seed in range(300):
        _, sizes, budget = problem(seed)
        chosen = largest(sizes, budget)
        assert total(sizes, chosen) == max(total(sizes, other) for other in every(sizes, budget)), seed


def test_units_that_are_all_alike_are_no_harder() -> None:
    """Equal costs are what a search by bounds has most trouble with."""
    costs, sizes = [[4.0, 1.0, 0.0]] * 60, [[3, 4, 8]] * 60
    assert sorted(allocate(costs, sizes, 60 * 3 + 10)) == [0] * 50 + [1] * 10
    assert total(costs, allocate([[0.0, 0.0, 0.0]] * 60, sizes, 300)) >= 0


def test_a_choice_that_is_no_better_is_not_paid_for() -> None:
    assert allocate([[1.0, 1.0], [3.0, 2.0]], [[1, 9], [1, 9]], 100) == [0, 1]


def test_a_budget_below_the_smallest_sizes_is_refused() -> None:
    for solve in (lambda: allocate([[1.0], [1.0]], [[3], [4]], 6), lambda: largest([[3], [4]], 6)):
        with pytest.raises(ValueError, match="the smallest sizes add up to 7, more than the budget of 6"):
            solve()


def test_llama_3_1_405b_takes_no_longer_than_a_command_starts() -> None:
    """126 layers of 4 units, at 6 widths: what a plan does each time."""
    draw, hidden, inner, kv, widths = random.Random(0), 16384, 53248, 1024, (2, 3, 4, 5, 6, 8)
    weights = [size for _ in range(126) for size in ((hidden + 2 * kv) * hidden, hidden * hidden, 2 * inner * hidden, inner * hidden)]
    sizes = [[count * bits // 8 + count // 64 for bits in widths] for count in weights]
    costs = [
        [scale * 4.0**-bits * draw.lognormvariate(0, 0.1) for bits in widths] for scale in (draw.lognormvariate(0, 1) for _ in weights)
    ]
    budget = sum(weights) * 4125 // 8000
    chosen, most = allocate(costs, sizes, budget), largest(sizes, budget)
    assert work_seconds(lambda: (allocate(costs, sizes, budget), largest(sizes, budget)), repeats=2) < 8 * import_seconds()
    assert 0.9999 * budget < total(sizes, chosen) <= total(sizes, most) <= budget
    assert total(costs, chosen) < 0.8 * total(costs, [widths.index(4)] * len(sizes))
