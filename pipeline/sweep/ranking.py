"""Which pipeline is best, and which differences may be an accident of the documents and seeds that were drawn.

One joint bootstrap (Efron, 1979; percentile intervals, Efron & Tibshirani, 1993): every resample draws as many documents as there are,
with replacement, and every pipeline is scored on the same draw. That pairs them: what makes documents differ in difficulty, far more
than what makes pipelines differ, cancels. A pipeline that was run with several seeds is one pipeline; its seeds are drawn with
replacement too (two levels: Davison & Hinkley, 1997, section 3.8), of each pipeline by itself.

Drawn from n seeds, the spread of their mean comes out (n - 1) / n of what it is, as a variance: two thirds with three seeds. Of one seed
nothing is known. What is compared with the best is compared with what turned out best here, and each comparison stands for itself.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.layout import Frozen

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float64]

RESAMPLES, SEED, TAIL = 10_000, 0, 0.025  # of a two-sided interval of 95 %
DRAWS_AT_ONCE = 1 << 22  # bounds memory: 8 bytes each for the draw and for its counts


class Change(Frozen):
    """Of a perplexity, in percent: on all documents, and the ends of its 95 % interval, None where documents cannot tell."""

    percent: float
    low: float | None = None
    high: float | None = None

    @property
    def is_tie(self) -> bool:
        """Whether no difference at all is among the plausible values."""
        return self.low is not None and self.high is not None and self.low <= 0.0 <= self.high


class Scores(NamedTuple):
    """Sums of nats over each document's scored tokens: of one pipeline [seeds][documents], and of its source model [documents]."""

    nll: Sequence[Sequence[float]]
    source: Sequence[float] | None


class Standing(NamedTuple):
    """`perplexity` is exp of nll per token, the mean over seeds. None: not measured, the best itself, without a source."""

    perplexity: float | None
    vs_best: Change | None
    vs_source: Change | None


def standings(pipelines: Sequence[Scores], tokens: Sequence[int]) -> list[Standing]:
    """Of each pipeline, in their order. tokens: [documents], scored in each; two documents at least."""
    import numpy as np

    assert len(tokens) > 1, "one document tells nothing of others"
    scored = np.asarray(tokens, dtype=np.float64)
    everything = np.ones((1, len(tokens)))
    nll = [np.asarray(scores.nll, dtype=np.float64).T for scores in pipelines]  # [documents, seeds] each
    sources = [None if scores.source is None else np.asarray(scores.source, dtype=np.float64)[:, None] for scores in pipelines]
    levels = [float(_per_token(everything, each, scored).mean()) for each in nll]
    best = levels.index(min(levels))
    drawn, drawn_sources = _resampled(nll, sources, scored)
    found = []
    for number, (level, source) in enumerate(zip(levels, sources, strict=True)):
        against = None if source is None else level - float(_per_token(everything, source, scored).item())
        found.append(
            Standing(
                math.exp(level),
                None if number == best else _change(level - levels[best], drawn[number] - drawn[best]),
                None if against is None else _change(against, drawn[number] - drawn_sources[number]),
            )
        )
    return found


def _resampled(nll: "Sequence[Floats]", sources: "Sequence[Floats | None]", scored: "Floats") -> "tuple[list[Floats], list[Floats]]":
    """Of each pipeline, and of its source model (nothing where there is none), nats per token in every resample: [resamples]."""
    import numpy as np

    documents = len(scored)
    generator = np.random.default_rng(SEED)
    of_seeds = [np.random.default_rng([SEED, 1 + number]) for number in range(len(nll))]  # so that no pipeline changes another's draws
    block = max(1, DRAWS_AT_ONCE // documents)
    drawn: list[list[Floats]] = [[] for _ in nll]
    of_sources: list[list[Floats]] = [[] for _ in nll]
    for first in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - first)
        counts = _counts(generator, rows, documents)
        for number, (each, source) in enumerate(zip(nll, sources, strict=True)):
            seeds = each.shape[1]
            weights = _counts(of_seeds[number], rows, seeds) / seeds if seeds > 1 else np.ones((rows, 1))
            drawn[number].append((_per_token(counts, each, scored) * weights).sum(axis=1))
            of_sources[number].append(np.zeros(0) if source is None else _per_token(counts, source, scored)[:, 0])
    return [np.concatenate(parts) for parts in drawn], [np.concatenate(parts) for parts in of_sources]


def _counts(generator: "numpy.random.Generator", rows: int, of: int) -> "Floats":
    """[rows, of]: how often each of `of` things was drawn, in `of` draws with replacement."""
    import numpy as np

    drawn = generator.integers(of, size=(rows, of)) + of * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * of).reshape(rows, of).astype(np.float64)


def _per_token(counts: "Floats", nll: "Floats", scored: "Floats") -> "Floats":
    """[resamples, seeds] from counts [resamples, documents], nll [documents, seeds] and scored tokens [documents]."""
    quotient: Floats = (counts @ nll) / (counts @ scored)[:, None]
    return quotient


def _change(nats: float, drawn: "Floats") -> Change:
    """A difference of nats per token as percent of perplexity: monotone, so the ends map to the ends."""
    import numpy as np

    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    percent, low, high = (100 * math.expm1(float(value)) for value in (nats, low, high))
    return Change(percent=percent, low=low, high=high)
