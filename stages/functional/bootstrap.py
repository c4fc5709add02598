"""Is the difference between two models real, or an accident of which documents were scored?

The paired bootstrap (Efron, 1979; percentile interval, Efron & Tibshirani, 1993): draw as many documents as there are, with
replacement, take both models' losses on them, and repeat. Pairing by document removes what makes documents differ in
difficulty, which is far more than what makes two quantizers differ. Documents, not tokens, are drawn, because the tokens of
one document are not independent.
"""

import math
from dataclasses import dataclass

import torch

DRAWS_AT_ONCE = 1 << 22  # bounds memory: 8 bytes of index and twice that of values for each


@dataclass(frozen=True)
class Interval:
    """A difference in nats per token: the estimate on all documents and the interval that holds it."""

    low: float
    high: float
    estimate: float

    @property
    def is_tie(self) -> bool:
        """Whether no difference at all is among the plausible values."""
        return self.low <= 0.0 <= self.high

    @property
    def perplexity_change_pct(self) -> "Interval":
        """The same as the change of perplexity in percent: monotone in the difference, so the ends map to the ends."""
        return Interval(*(100 * math.expm1(value) for value in (self.low, self.high, self.estimate)))


def paired_bootstrap(
    a_nll: torch.Tensor,
    b_nll: torch.Tensor,
    tokens: torch.Tensor,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of nll per token of `a` minus that of `b`.

    a_nll, b_nll: [documents] sums of nats over each document's scored tokens; tokens: [documents] their counts.
    ValueError where the three do not describe the same two or more documents.
    """
    if not a_nll.shape == b_nll.shape == tokens.shape or a_nll.ndim != 1 or len(a_nll) < 2:
        raise ValueError("a paired bootstrap needs the same two or more documents of both models")
    difference, weight = a_nll.double() - b_nll.double(), tokens.double()
    sums = resampled_sums(torch.stack([difference, weight], dim=1), resamples, seed)
    tail = (1 - confidence) / 2
    ends = torch.quantile(sums[:, 0] / sums[:, 1], torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(low=ends[0].item(), high=ends[1].item(), estimate=(difference.sum() / weight.sum()).item())


def resampled_sums(columns: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    """[resamples, k] sums of columns [n, k] over as many rows as there are, drawn with replacement: the same rows for every column."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(columns)
    block = max(1, DRAWS_AT_ONCE // rows)
    sums = []
    for first in range(0, resamples, block):
        drawn = torch.randint(rows, (min(block, resamples - first), rows), generator=generator)
        sums.append(torch.stack([column[drawn].sum(1) for column in columns.T], dim=1))
    return torch.cat(sums)
