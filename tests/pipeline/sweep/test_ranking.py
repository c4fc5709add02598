"""Planted differences are found, planted ties are ties, and the intervals are as wide as they have to be."""

import math

import numpy as np
import pytest

from pipeline.sweep.ranking import Change, Scores, standings

DOCUMENTS = 55


def made(seed: int = 0, documents: int = DOCUMENTS) -> tuple[np.random.Generator, list[int], np.ndarray]:
    """A generator, scored tokens, and the nats per token that a good model needs: documents differ far more than models do."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(100, 4000, documents)
    return generator, tokens.tolist(), generator.normal(2.5, 0.6, documents)


def scores(level: np.ndarray, tokens: list[int], *more: np.ndarray) -> Scores:
    """Of one pipeline, a row for each seed."""
    return Scores([(each * np.array(tokens)).tolist() for each in (level, *more)], None)


def test_a_better_pipeline_wins_and_the_interval_holds_the_planted_difference() -> None:
    generator, tokens, level = made()
    worse = [level + 0.05 + generator.normal(0, 0.02, DOCUMENTS), level + 0.10 + generator.normal(0, 0.02, DOCUMENTS)]
    found = standings([scores(worse[1], tokens), scores(level, tokens), scores(worse[0], tokens)], tokens)
    assert found[1].vs_best is None and found[1].perplexity == min(one.perplexity or 0 for one in found)
    for standing, planted in ((found[2], 0.05), (found[0], 0.10)):
        change = standing.vs_best
        assert change is not None and change.low is not None and change.high is not None and not change.is_tie
        assert change.low < 100 * math.expm1(planted) < change.high
        assert change.high - change.low < 3  # percent; unpaired it would be wider than 30


def test_perplexity_is_that_of_all_tokens_together() -> None:
    found = standings([Scores([[10.0, 60.0]], [5.0, 30.0])], [10, 20])
    assert found[0].perplexity == pytest.approx(math.exp(70 / 30))
    assert found[0].vs_source is not None
    assert found[0].vs_source.percent == pytest.approx(100 * math.expm1(35 / 30))


def test_pipelines_that_differ_by_noise_alone_tie_and_the_same_one_does_exactly() -> None:
    generator, tokens, level = made(1)
    noisy = level + generator.normal(0, 0.05, DOCUMENTS)
    noisy += 0.0002 - np.average(noisy - level, weights=tokens)  # a hair worse over all tokens
    found = standings([scores(level, tokens), scores(noisy, tokens), scores(level, tokens)], tokens)
    assert found[1].vs_best is not None and found[1].vs_best.is_tie and found[1].vs_best.percent > 0
    assert found[2].vs_best == Change(percent=0.0, low=0.0, high=0.0) and found[2].vs_best.is_tie


def test_seeds_widen_the_interval_where_they_differ_and_do_not_where_they_agree() -> None:
    generator, tokens, level = made(2)
    worse = level + 0.03 + generator.normal(0, 0.02, DOCUMENTS)

    def width(*shifts: float) -> tuple[float, bool]:
        shifted = [worse + shift for shift in shifts]
        change = standings([scores(level, tokens), scores(*shifted[:1], tokens, *shifted[1:])], tokens)[1].vs_best
        assert change is not None and change.low is not None and change.high is not None
        return change.high - change.low, change.is_tie

    alone, agreeing, differing = width(0.0), width(0.0, 0.0, 0.0), width(-0.06, 0.0, 0.06)
    assert agreeing[0] == pytest.approx(alone[0])
    assert differing[0] > 3 * alone[0]
    assert (alone[1], differing[1]) == (False, True)


def test_what_a_pipeline_is_compared_with_does_not_depend_on_the_others() -> None:
    generator, tokens, level = made(3)
    best, worse = scores(level, tokens), scores(level + generator.normal(0.04, 0.02, DOCUMENTS), tokens, level + 0.05)
    other = scores(level + 0.5, tokens, level + 0.6, level + 0.7)
    assert standings([best, worse], tokens)[1] == standings([best, worse, other], tokens)[1]


def test_documents_in_more_blocks_than_one_are_drawn_alike_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokens, level = made(4)
    shifted = [scores(level, tokens), scores(level + 0.02, tokens)]
    monkeypatch.setattr("pipeline.sweep.ranking.DRAWS_AT_ONCE", 7 * DOCUMENTS)
    change = standings(shifted, tokens)[1].vs_best
    assert change is not None and change.low == pytest.approx(change.high) == pytest.approx(100 * math.expm1(0.02))


def test_about_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    """Of pipelines that differ by nothing, drawn again and again."""
    held = 0
    for seed in range(120):
        generator, tokens, level = made(seed, 40)
        found = standings([scores(level, tokens), scores(level + generator.normal(0, 0.05, 40), tokens)], tokens)
        held += all(one.vs_best is None or one.vs_best.is_tie for one in found)
    assert 105 <= held <= 119
