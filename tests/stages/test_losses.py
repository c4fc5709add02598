"""Losses against their definitions in float64."""

import torch

from stages.functional.losses import token_kl_divergence, token_nll, top1_matches

TOKENS, VOCABULARY = 11, 37


def logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (4 * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


def test_nll_is_minus_the_log_of_the_targets_probability() -> None:
    scores, targets = logits(0), torch.arange(TOKENS)
    expected = -scores.double().softmax(-1)[torch.arange(TOKENS), targets].log()
    assert torch.allclose(token_nll(scores, targets).double(), expected, atol=1e-5)


def test_kl_divergence_is_its_sum_and_is_not_symmetric() -> None:
    p, q = logits(1), logits(2)
    dp, dq = p.double().softmax(-1), q.double().softmax(-1)
    assert torch.allclose(token_kl_divergence(p, q).double(), (dp * (dp / dq).log()).sum(-1), atol=1e-4)
    assert not torch.allclose(token_kl_divergence(p, q), token_kl_divergence(q, p), atol=0.1)


def test_equal_distributions_have_no_divergence_and_a_shift_of_logits_is_none() -> None:
    p = logits(3)
    assert torch.equal(token_kl_divergence(p, p), torch.zeros(TOKENS))
    assert torch.allclose(token_kl_divergence(p, p + 7), torch.zeros(TOKENS), atol=1e-5)


def test_half_precision_logits_are_scored_in_float32() -> None:
    half, targets = logits(4, torch.bfloat16), torch.arange(TOKENS)
    assert token_nll(half, targets).dtype == token_kl_divergence(half, half).dtype == torch.float32
    assert torch.equal(token_nll(half, targets), token_nll(half.float(), targets))


def test_top1_matches_counts_equal_first_choices() -> None:
    p = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]])
    q = torch.tensor([[0.0, 1.0, 9.0], [1.0, 5.0, 2.0]])
    assert top1_matches(p, q).tolist() == [True, False]
