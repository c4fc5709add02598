"""Losses over next-token distributions, token by token, in float32 whatever the logits' dtype."""

import torch
from torch.nn import functional


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target in nats. logits [tokens, vocabulary], targets [tokens] int64 -> [tokens] float32."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def token_kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of each token in nats (Kullback & Leibler, 1951): what the model loses of the reference's own view.

    Both are logits [tokens, vocabulary] -> [tokens] float32. Exactly 0 where they are equal.
    """
    return kl_of(reference.float().log_softmax(-1), logits.float().log_softmax(-1))


def nll_of(log_q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`token_nll`, of log-probabilities: [tokens, vocabulary], targets [tokens] int64 -> [tokens]."""
    return functional.nll_loss(log_q, targets, reduction="none")


def kl_of(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`token_kl_divergence`, of log-probabilities: [tokens, vocabulary] each -> [tokens]."""
    return log_p.exp().mul_(log_p - log_q).sum(-1)


def top1_matches(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both put the same token first: logits [tokens, vocabulary] each -> [tokens] bool."""
    return reference.argmax(-1) == logits.argmax(-1)
