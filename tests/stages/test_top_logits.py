"""Slices of a vocabulary, joined, are the vocabulary."""

import pytest
import torch

from stages.functional.top_logits import TopLogits, join, top_logits


def sliced(logits: torch.Tensor, k: int, temperature: float, rows: int) -> TopLogits:
    parts = [top_logits(logits[..., first : first + rows], k, temperature, first) for first in range(0, logits.shape[-1], rows)]
    top = parts[0]
    for part in parts[1:]:
        top = join(top, part, k)
    return top


@pytest.mark.parametrize("k", [1, 5, 30, 100])  # also more than a slice holds, and all words
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_slices_joined_are_the_whole(k: int, temperature: float) -> None:
    logits = 5 * torch.randn(4, 7, 100, generator=torch.Generator().manual_seed(k))
    top = sliced(logits, k, temperature, rows=23)
    assert torch.equal(top.logits, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, top.ids), top.logits)
    torch.testing.assert_close(top.logsumexp, (logits / temperature).logsumexp(-1), atol=1e-5, rtol=0)
    if k == 100:
        torch.testing.assert_close((top.logits / temperature - top.logsumexp[..., None]).exp().sum(-1), torch.ones(4, 7))


def test_equal_logits_are_kept_once_each() -> None:
    top = sliced(torch.ones(2, 9), 4, 1.0, rows=2)
    assert top.ids.shape == (2, 4) and all(len(set(row)) == 4 for row in top.ids.tolist())


def test_large_logits_do_not_overflow() -> None:
    top = sliced(torch.tensor([[30000.0, -30000.0, 29999.0]]), 1, 0.5, rows=1)
    assert top.ids.tolist() == [[0]] and top.logsumexp.isfinite().all()
