"""The largest logits of each token, and the mass of all of them, from logits that may come in slices of the vocabulary.

    top = top_logits(slice_0, k, T, first=0)
    top = join(top, top_logits(slice_1, k, T, first=len_0), k)        # and so on: never [tokens, vocabulary]

Joining slices gives the logits that the whole would give, exactly; among equal logits either id may be kept.
"""

from typing import NamedTuple

import torch


class TopLogits(NamedTuple):
    """Of tokens [...]; with p = softmax(logits / temperature), log p of a kept token is logit / temperature - logsumexp."""

    ids: torch.Tensor  # [..., k] int64
    logits: torch.Tensor  # [..., k] float32, falling, not divided by the temperature
    logsumexp: torch.Tensor  # [...] float32: of logits / temperature over every word, kept or not

    def cpu(self) -> "TopLogits":
        return TopLogits(*(tensor.cpu() for tensor in self))


def top_logits(logits: torch.Tensor, k: int, temperature: float, first: int = 0) -> TopLogits:
    """The k largest (all, where there are fewer) of float32 `logits` [..., words], whose words are numbered from `first`."""
    values, ids = logits.topk(min(k, logits.shape[-1]))
    return TopLogits(ids + first, values, (logits / temperature).logsumexp(-1))


def join(left: TopLogits, right: TopLogits, k: int) -> TopLogits:
    """The k largest of two parts of one vocabulary."""
    logits, ids = torch.cat([left.logits, right.logits], -1), torch.cat([left.ids, right.ids], -1)
    values, chosen = logits.topk(min(k, logits.shape[-1]))
    return TopLogits(ids.gather(-1, chosen), values, torch.logaddexp(left.logsumexp, right.logsumexp))
