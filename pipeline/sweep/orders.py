"""The orders in which a recipe's stages can stand, each one planned: legal, or not with the reasons.

What makes a model or an adapter moves. What measures or exports is pinned: before all that moves it stays first; directly behind a stage it
follows that stage; at the end it stays last. An evaluation at the end that also stands behind other stages does both, once where the
two fall together. What only feeds a later stage (stored logits) stays before that stage.

    prune, evaluate, distill, quantize, evaluate    with quantize first:    quantize, evaluate, prune, evaluate, distill, evaluate

Legality is the plan's own type check; there is no table of forbidden pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Literal

from pipeline.artifact import MEASUREMENTS, Adapter, Checkpoint, Export
from pipeline.errors import RecipeError, did_you_mean
from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.stage import Stage

MOST_ORDERS = 5040  # of seven stages, all of them
Role = Literal["moves", "measures", "feeds"]


@dataclass(frozen=True)
class Block:
    """A stage that moves, with what feeds it and what measures it."""

    name: str
    feeds: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """A recipe's order taken apart."""

    first: tuple[str, ...]
    blocks: tuple[Block, ...]
    last: tuple[str, ...]

    def order(self, blocks: Sequence[Block]) -> tuple[str, ...]:
        """Put together with these blocks. A name that would stand twice in a row of measurements stands once."""
        pinned = [(name, "measures") for name in self.first]
        for block in blocks:
            pinned += [(name, "feeds") for name in block.feeds] + [(block.name, "moves")] + [(name, "measures") for name in block.measured]
        pinned += [(name, "measures") for name in self.last]
        runs = groupby(pinned, key=lambda part: part[1] == "measures")
        return tuple(name for measures, run in runs for name, _ in (dict.fromkeys(run) if measures else run))


@dataclass(frozen=True)
class Candidate:
    """One order: its plan, or why there is none."""

    order: tuple[str, ...]
    moved: tuple[str, ...]  # the stages that move, as they stand in it
    plan: Plan | None
    error: RecipeError | None = None


def legal_orders(recipe: Recipe, plan_of: Callable[[Recipe], Plan], subset: bool = False) -> Iterator[Candidate]:
    """Every permutation of the stages that move, with `subset` also of every part of them, each planned by `plan_of`.

    In prefix order: orders that begin alike follow each other, after the recipe's own order. Equal names are not told apart, so no order
    comes twice. A RecipeError of `plan_of` makes that order illegal; RecipeError where nothing moves or there are too many orders.
    """
    parts = take_apart(recipe)
    found = list(islice(arrangements(parts.blocks, subset), MOST_ORDERS + 1))
    if len(found) > MOST_ORDERS:
        raise RecipeError(
            f"order: {len(parts.blocks)} stages that move have more than {MOST_ORDERS:,} orders; name fewer with order=[...], or list the "
            "orders yourself, order=[a,b],[b,a], without hydra/sweeper=orders"
        )
    return (_candidate(recipe, parts.order(blocks), tuple(block.name for block in blocks), plan_of) for blocks in found)


def arrangements(blocks: Sequence[Block], subset: bool) -> Iterator[tuple[Block, ...]]:
    """All of them in every order; with `subset`, every non-empty part of them too, each right before what it is a prefix of."""

    def walk(taken: tuple[Block, ...], left: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
        if taken and (subset or not left):
            yield taken
        for block in dict.fromkeys(left):
            at = left.index(block)
            yield from walk((*taken, block), left[:at] + left[at + 1 :])

    return walk((), tuple(blocks))


def take_apart(recipe: Recipe) -> Parts:
    """RecipeError where the order names a stage that the recipe lacks, or nothing in it moves."""
    unknown = [name for name in dict.fromkeys(recipe.order) if name not in recipe.stages]
    if unknown:
        raise RecipeError(f"order: '{name}' is not under `stages`{did_you_mean(name, recipe.stages)}" for name in unknown)
    first: list[str] = []
    feeds: list[str] = []
    blocks: list[Block] = []
    for name in recipe.order:
        role = _role(recipe.stages[name].stage)
        if role == "feeds":
            feeds.append(name)
        elif role == "moves":
            blocks.append(Block(name, tuple(feeds)))
            feeds = []
        elif blocks:
            blocks[-1] = replace(blocks[-1], measured=(*blocks[-1].measured, name))
        else:
            first.append(name)
    if not blocks:
        raise RecipeError(f"order: nothing in it makes a model, so nothing can be permuted: {', '.join(recipe.order)}; name more stages")
    if feeds:
        raise RecipeError(f"order: {feeds[0]} stands behind every stage that could read what it makes; move it before one, or leave it out")
    *others, end = blocks
    everywhere = {name for block in others for name in block.measured}
    kept = replace(end, measured=tuple(name for name in end.measured if name in everywhere))
    return Parts(tuple(first), (*others, kept), end.measured)


def _role(stage: Stage) -> Role:
    made = [kind for port in stage.outputs().values() for kind in port.accepts]
    if any(issubclass(kind, Checkpoint | Adapter) for kind in made):
        return "moves"
    return "measures" if all(issubclass(kind, (*MEASUREMENTS, Export)) for kind in made) else "feeds"


def _candidate(recipe: Recipe, order: tuple[str, ...], moved: tuple[str, ...], plan_of: Callable[[Recipe], Plan]) -> Candidate:
    try:
        return Candidate(order, moved, plan_of(replace(recipe, order=order)))
    except RecipeError as error:
        return Candidate(order, moved, None, error)
