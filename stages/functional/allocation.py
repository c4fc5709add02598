"""Which of several sizes each of many things gets under a common budget: the multiple-choice knapsack. Needs no torch: a plan reads it.

Of every unit one choice is taken. Each has a size, of which the sum may not exceed the budget, and a cost, of which the sum is to be least:

    allocate([[9, 1], [5, 4]], [[3, 8], [3, 8]], budget=11)    # [1, 0]: the first unit gains more from the larger size

Two steps, after Dyer (1984, https://doi.org/10.1007/BF02591729) and Pisinger (1995, https://doi.org/10.1016/0377-2217(95)00015-I). A price
per byte is searched at which each unit chooses for itself and all just fit: a solution, and a lower bound for any. Then units are decided
one by one, and of the states that this leads to those are dropped that cost more than a smaller one, or cannot lead to less than the best
solution known. What is left at the end is the optimum.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Costs: TypeAlias = Sequence[Sequence[float]]
Sizes: TypeAlias = Sequence[Sequence[int]]
Decisions: TypeAlias = tuple[int, "Decisions"] | None  # the last one first

PRICE_HALVINGS = 100  # of the interval that holds the price: to the last bit of a float
GAP = 1e-6  # relative: a solution that is better by less is not searched for


class _State(NamedTuple):
    """Some units decided: their sizes together, their costs, the decisions."""

    size: int
    cost: float
    chosen: Decisions


def allocate(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """The choice of each unit, [units] indices into its row, of least total cost (within GAP) among those of total size <= budget.

    costs, sizes: [units][choices]. ValueError where not even the smallest sizes fit.
    """
    least = sum(map(min, sizes))
    if least > budget:
        raise ValueError(f"the smallest sizes add up to {least}, more than the budget of {budget}")
    price, found = _price(costs, sizes, budget)
    best = _total(costs, found)
    priced = [[cost + price * size for cost, size in zip(*rows, strict=True)] for rows in zip(costs, sizes, strict=True)]
    spread = [max(row) - min(row) for row in priced]
    order = sorted(range(len(costs)), key=lambda unit: -spread[unit])  # what is clear first: it leaves few states
    rest = _sums_after([min(priced[unit]) for unit in order])
    least_after = _sums_after([float(min(sizes[unit])) for unit in order])
    states = [_State(0, 0.0, None)]
    for place, unit in enumerate(order):
        grown = (
            _State(state.size + size, state.cost + cost, (choice, state.chosen))
            for state in states
            for choice, (cost, size) in enumerate(zip(costs[unit], sizes[unit], strict=True))
        )
        limit = best - GAP * abs(best)
        states = _undominated(
            state
            for state in grown
            if state.size + least_after[place + 1] <= budget and state.cost + price * (state.size - budget) + rest[place + 1] < limit
        )
    last = min(states, key=lambda state: state.cost, default=None)
    return found if last is None or last.cost >= best else _decisions(last, order)


def largest(sizes: Sizes, budget: int) -> list[int]:
    """The choice of each unit of the largest total size <= budget: no allocation under that budget is larger, whatever costs are.

    ValueError where not even the smallest sizes fit.
    """
    unit = math.gcd(*(size for row in sizes for size in row))
    room = budget // unit
    reached = [1]  # after each unit, bit n: some choices have n times `unit` together
    for row in sizes:
        reached.append(functools.reduce(int.__or__, (reached[-1] << size // unit for size in row)) & ((1 << room + 1) - 1))
    if not reached[-1]:
        raise ValueError(f"the smallest sizes add up to {sum(map(min, sizes))}, more than the budget of {budget}")
    total, chosen = reached[-1].bit_length() - 1, list[int]()
    for row, before in zip(reversed(sizes), reversed(reached[:-1]), strict=True):
        chosen.append(next(n for n, size in enumerate(row) if size // unit <= total and before >> total - size // unit & 1))
        total -= row[chosen[-1]] // unit
    return chosen[::-1]


def _price(costs: Costs, sizes: Sizes, budget: int) -> tuple[float, list[int]]:
    """The least price per unit of size at which the units' own choices fit the budget, and those choices, improved where room is left."""
    low, high = 0.0, 1.0
    while _size(sizes, _choices(costs, sizes, high)) > budget:
        low, high = high, 2 * high
        if high > 1e300:
            return 0.0, _improved(costs, sizes, budget, [row.index(min(row)) for row in sizes])
    for _ in range(PRICE_HALVINGS):
        middle = (low + high) / 2
        if _size(sizes, _choices(costs, sizes, middle)) > budget:
            low = middle
        else:
            high = middle
    return high, _improved(costs, sizes, budget, _choices(costs, sizes, high))


def _choices(costs: Costs, sizes: Sizes, price: float) -> list[int]:
    """What each unit takes for itself at that price; of equal ones the smallest."""
    return [
        min(range(len(cost)), key=lambda choice: (cost[choice] + price * size[choice], size[choice]))
        for cost, size in zip(costs, sizes, strict=True)
    ]


def _improved(costs: Costs, sizes: Sizes, budget: int, chosen: list[int]) -> list[int]:
    """Room that is left is spent where it saves most, again and again."""
    chosen, room = list(chosen), budget - _size(sizes, chosen)
    while True:
        better = [
            (costs[unit][choice] - costs[unit][chosen[unit]], unit, choice)
            for unit in range(len(costs))
            for choice in range(len(costs[unit]))
            if sizes[unit][choice] - sizes[unit][chosen[unit]] <= room
        ]
        gain, unit, choice = min(better)
        if gain >= 0:
            return chosen
        room -= sizes[unit][choice] - sizes[unit][chosen[unit]]
        chosen[unit] = choice


def _undominated(states: Iterable[_State]) -> list[_State]:
    """Those than which no smaller or equal one costs less or the same, by rising size."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state.size, state.cost)):
        if not kept or state.cost < kept[-1].cost:
            kept.append(state)
    return kept


def _decisions(state: _State, order: Sequence[int]) -> list[int]:
    chosen, decisions = [0] * len(order), state.chosen
    for unit in reversed(order):
        assert decisions is not None, "a state of the end has decided every unit"
        chosen[unit], decisions = decisions
    return chosen


def _sums_after(values: Sequence[float]) -> list[float]:
    """[n + 1]: at each place the sum from there on."""
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _size(sizes: Sizes, chosen: Sequence[int]) -> int:
    return sum(row[choice] for row, choice in zip(sizes, chosen, strict=True))


def _total(costs: Costs, chosen: Sequence[int]) -> float:
    return sum(row[choice] for row, choice in zip(costs, chosen, strict=True))
