"""Losses of a language model's output embedding, from hidden states, in chunks of tokens: a full [tokens, vocabulary] never exists.

Logits of 4,096 tokens over 128,256 words are 2.1 GB in float32; distillation needs them of two models, and their gradients. Here a
chunk's logits are made, its loss and the gradient of its logits written down in closed form, and that gradient multiplied back
to the hidden states and the embedding at once, in the forward pass. So nothing of a chunk outlives it and nothing is computed twice
(recomputing each chunk in the backward pass instead would cost one more product with the embedding of each model).

With student logits z, teacher logits y, temperature T, q = softmax(z / T), p = softmax(y / T):
    cross-entropy       -log softmax(z)[label]      gradient  softmax(z) - onehot(label)
    T^2 KL(p || q)      T^2 sum p (log p - log q)   gradient  T (q - p)
T^2 keeps the second's gradient of the first's order whatever T is (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Sums = dict[str, torch.Tensor]
"""`loss`, and any terms of it: float32 scalars, summed over a chunk's tokens."""

Objective = Callable[[slice, torch.Tensor], tuple[Sums, torch.Tensor]]
"""(which tokens, their logits [tokens, vocabulary], at least float32 and free to be overwritten) -> sums and d loss / d logits."""


def linear_loss(hidden: torch.Tensor, weight: torch.Tensor, objective: Objective, chunk_tokens: int) -> Sums:
    """`objective` of the logits hidden @ weight.T, chunk by chunk; `loss` carries the gradient, the other sums do not.

    hidden [tokens, hidden_size], weight [vocabulary, hidden_size]. Products run in autocast's dtype where it is on, the rest in
    float32. Backward can be called once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    names: list[str] = []
    with torch.autocast(device, enabled=False):
        loss, *others = _LinearLoss.apply(hidden, weight, objective, chunk_tokens, dtype, names)  # type: ignore[no-untyped-call]
    return {"loss": loss, **dict(zip(names, others, strict=True))}


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, objective: Objective, size: int, dtype: torch.dtype, names: list[str]
    ) -> tuple[torch.Tensor, ...]:
        states, matrix = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if ctx.needs_input_grad[1] else None
        totals: Sums = {"loss": torch.zeros((), device=hidden.device)}
        for first in range(0, len(states), size):
            rows = slice(first, min(first + size, len(states)))
            logits = states[rows] @ matrix.T
            sums, gradient = objective(rows, logits.float() if dtype.itemsize < 4 else logits)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ matrix
            if grad_weight is not None:
                grad_weight += gradient.T @ states[rows]
            totals |= {name: totals.get(name, 0) + value for name, value in sums.items()}
        ctx.gradients = grad_hidden, grad_weight
        loss = totals.pop("loss")
        names.extend(totals)
        ctx.mark_non_differentiable(*totals.values())
        return loss, *totals.values()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second call would find them scaled already
        return *(None if gradient is None else gradient.mul_(scale) for gradient in gradients), None, None, None, None


@dataclass(frozen=True)
class CrossEntropy:
    """Of the labels [tokens]. An `Objective`."""

    labels: torch.Tensor

    def __call__(self, rows: slice, logits: torch.Tensor) -> tuple[Sums, torch.Tensor]:
        labels, log_q = self.labels[rows, None], logits.log_softmax(-1)
        total = -log_q.gather(-1, labels).sum()
        return {"loss": total}, log_q.exp_().scatter_add_(-1, labels, log_q.new_full(labels.shape, -1))


Divergence = Callable[[slice, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""(which tokens, student logits / T, T) -> the sum of KL(teacher || student) and its gradient by those."""


@dataclass(frozen=True)
class Distillation:
    """alpha * T^2 * KL(teacher || student at temperature T) + (1 - alpha) * cross-entropy. An `Objective`.

    Its terms, where they are computed: `kl_divergence` (at temperature T, without the factor T^2) and `cross_entropy`, in nats.
    """

    labels: torch.Tensor
    divergence: Divergence
    temperature: float
    alpha: float

    def __call__(self, rows: slice, logits: torch.Tensor) -> tuple[Sums, torch.Tensor]:
        kl, gradient = self.divergence(rows, logits / self.temperature, self.temperature)
        loss = self.alpha * self.temperature**2 * kl
        gradient *= self.alpha * self.temperature
        sums = {"kl_divergence": kl}
        if self.alpha < 1:
            hard, hard_gradient = CrossEntropy(self.labels)(rows, logits)
            loss = loss + (1 - self.alpha) * hard["loss"]
            gradient.add_(hard_gradient, alpha=1 - self.alpha)
            sums["cross_entropy"] = hard["loss"]
        return {"loss": loss, **sums}, gradient


@dataclass(frozen=True)
class FullTeacher:
    """A teacher's hidden states [tokens, its hidden_size] and its output embedding. A `Divergence`."""

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, rows: slice, student: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = self.head(self.hidden[rows]).to(student.dtype).div_(temperature).log_softmax(-1)
        log_q, p = student.log_softmax(-1), log_p.exp()
        kl = log_p.sub_(log_q).mul_(p).sum()
        return kl, log_q.exp_().sub_(p)


@dataclass(frozen=True)
class TopTeacher:
    """A teacher's k largest logits [tokens, k] with their ids, and the logsumexp [tokens] of all its logits / T. A `Divergence`.

    What the teacher gives to all other tokens together is one more outcome, compared with what the student gives to them together:
    a lower bound of the full divergence, equal to it where k is the whole vocabulary. Within the tail the teacher has no say: its
    gradient there scales the student's own proportions.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    logsumexp: torch.Tensor

    def __call__(self, rows: slice, student: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.ids[rows]
        log_p = self.logits[rows].to(student.dtype) / temperature - self.logsumexp[rows].to(student.dtype)[:, None]
        p = log_p.exp()
        log_q = student.log_softmax(-1)
        kl = (p * (log_p - log_q.gather(-1, ids))).sum()
        gradient = log_q.exp()
        if ids.shape[-1] < student.shape[-1]:
            tail = (1 - p.sum(-1)).clamp_(min=0)  # rounding can make it a little negative
            rest = log_q.scatter_(-1, ids, -torch.inf)
            log_rest = rest.logsumexp(-1)
            kl = kl + (torch.xlogy(tail, tail) - tail * log_rest).sum()
            gradient -= tail[:, None] * rest.sub_(log_rest[:, None]).exp_()
        return kl, gradient.scatter_add_(-1, ids, -p)
