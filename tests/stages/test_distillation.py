"""Chunked losses of an output embedding: value and gradient of each against the same written out, and why no chunk can overflow."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from stages.functional import distillation
from stages.functional.distillation import CrossEntropy, Distillation, FullTeacher, Objective, Sums, TopTeacher, linear_loss

TOKENS, WIDTH, WORDS = 37, 16, 301
MIXES = [(0.7, 2.0), (1.0, 1.0), (0.3, 5.0), (1.0, 0.5)]


class Case:
    """Random student and teacher, and the losses of their whole logits."""

    def __init__(self, dtype: torch.dtype = torch.float32, alpha: float = 0.7, temperature: float = 2.0) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        generator = torch.Generator().manual_seed(0)
        self.alpha, self.temperature = alpha, temperature
        self.hidden, self.weight = draw(TOKENS, WIDTH).requires_grad_(), draw(WORDS, WIDTH).requires_grad_()
        self.teacher_hidden, self.teacher_weight = draw(TOKENS, WIDTH + 8), 0.7 * draw(WORDS, WIDTH + 8)
        self.labels = torch.randint(WORDS, (TOKENS,), generator=generator)
        self.teacher_logits = self.teacher_hidden @ self.teacher_weight.T

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight

    @property
    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.T

    def cross_entropy(self) -> torch.Tensor:
        return functional.cross_entropy(self.logits, self.labels, reduction="sum")

    def reference(self) -> torch.Tensor:
        log_p = (self.teacher_logits / self.temperature).log_softmax(-1)
        log_q = (self.logits / self.temperature).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        return self.alpha * self.temperature**2 * kl + (1 - self.alpha) * self.cross_entropy()

    def tail_reference(self, k: int) -> torch.Tensor:
        """With all words but the teacher's k likeliest as one outcome."""
        p = (self.teacher_logits / self.temperature).softmax(-1)
        q = (self.logits / self.temperature).softmax(-1)
        ids = self.teacher_logits.topk(k).indices
        outcomes = [torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q)]
        kl = (outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum()
        return self.alpha * self.temperature**2 * kl + (1 - self.alpha) * self.cross_entropy()

    def full(self) -> Objective:
        divergence = FullTeacher(self.teacher_hidden, lambda states: states @ self.teacher_weight.T)
        return Distillation(self.labels, divergence, self.temperature, self.alpha)

    def top(self, k: int) -> Objective:
        top = self.teacher_logits.topk(k)
        divergence = TopTeacher(top.indices, top.values, (self.teacher_logits / self.temperature).logsumexp(-1))
        return Distillation(self.labels, divergence, self.temperature, self.alpha)

    def check(self, objective: Objective, expected: torch.Tensor, rtol: float, chunk: int = 10) -> Sums:
        """The loss and both gradients, relative to their size."""
        made = linear_loss(self.hidden, self.weight, objective, chunk)
        gradients = [torch.autograd.grad(3 * loss, self.inputs) for loss in (made["loss"], expected)]
        torch.testing.assert_close(made["loss"], expected, rtol=rtol, atol=0)
        for mine, theirs in zip(*gradients, strict=True):
            assert (mine - theirs).norm() <= rtol * theirs.norm()
        return made


@pytest.mark.parametrize(("alpha", "temperature"), MIXES)
def test_a_full_teacher_gives_the_loss_and_gradient_written_out(alpha: float, temperature: float) -> None:
    case = Case(torch.float32, alpha, temperature)
    case.check(case.full(), case.reference(), 1e-6)
    exact = Case(torch.float64, alpha, temperature)
    exact.check(exact.full(), exact.reference(), 1e-13)


@pytest.mark.parametrize(("alpha", "temperature"), MIXES)
@pytest.mark.parametrize("k", [1, 20, 200])
def test_stored_logits_give_the_loss_and_gradient_written_out(alpha: float, temperature: float, k: int) -> None:
    exact = Case(torch.float64, alpha, temperature)
    exact.check(exact.top(k), exact.tail_reference(k), 1e-12)
    case = Case(torch.float32, alpha, temperature)
    made = linear_loss(case.hidden, case.weight, case.top(k), 10)["loss"]  # the reference's own tail is not precise in float32
    assert made.item() == pytest.approx(exact.tail_reference(k).item(), rel=1e-6)
    for mine, theirs in zip(
        *(torch.autograd.grad(*pair) for pair in ((made, case.inputs), (exact.tail_reference(k), exact.inputs))), strict=True
    ):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("k", [WORDS, WORDS - 1])
def test_stored_logits_of_every_word_are_the_full_teacher(k: int) -> None:
    case = Case()
    case.check(case.top(k), case.reference(), 1e-6)


def test_stored_logits_bound_the_divergence_from_below_and_approach_it() -> None:
    case = Case(alpha=1.0)
    losses = [linear_loss(case.hidden, case.weight, case.top(k), 10)["loss"] for k in (1, 10, 100, 250, WORDS)]
    assert all(low < high for low, high in itertools.pairwise(losses))
    torch.testing.assert_close(losses[-1], case.reference())


def test_a_student_equal_to_its_teacher_loses_nothing_and_learns_nothing() -> None:
    case = Case(alpha=1.0)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    case.teacher_logits = case.logits.detach()
    for objective in (case.full(), case.top(20)):
        loss = linear_loss(case.hidden, case.weight, objective, 10)["loss"]
        assert abs(loss) < 1e-4
        assert all(gradient.abs().max() < 1e-4 for gradient in torch.autograd.grad(loss, case.inputs))


def test_cross_entropy_alone() -> None:
    case = Case()
    case.check(CrossEntropy(case.labels), case.cross_entropy(), 1e-6)


def test_the_terms_of_a_loss_come_with_it() -> None:
    case = Case(alpha=0.7, temperature=2.0)
    made = linear_loss(case.hidden, case.weight, case.full(), 10)
    assert made["loss"].item() == pytest.approx((0.7 * 4 * made["kl_divergence"] + 0.3 * made["cross_entropy"]).item(), rel=1e-6)
    assert made["cross_entropy"].item() == pytest.approx(case.cross_entropy().item(), rel=1e-6)
    assert not made["kl_divergence"].requires_grad
    only = Case(alpha=1.0)
    assert "cross_entropy" not in linear_loss(only.hidden, only.weight, only.full(), 10)


@pytest.mark.parametrize("chunk", [1, 36, 37, 1000])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    case = Case()
    case.check(case.full(), case.reference(), 1e-6, chunk)


@pytest.mark.parametrize("k", [1, 8])
def test_probabilities_that_underflow_are_no_nan(k: int) -> None:
    """Both put all mass on some words: the student's tail, or the teacher's, is zero in float32."""
    case = Case(alpha=1.0, temperature=1.0)
    with torch.no_grad():
        case.weight.mul_(60)
    case.teacher_logits = 200 * case.teacher_logits
    case.teacher_weight = 200 * case.teacher_weight
    for objective in (case.full(), case.top(k)):
        loss = linear_loss(case.hidden, case.weight, objective, 10)["loss"]
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, case.inputs))


def test_no_more_logits_exist_than_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    divergence = FullTeacher.__call__

    def watch(self: FullTeacher, rows: slice, student: torch.Tensor, temperature: float) -> Any:
        seen.append(len(student))
        return divergence(self, rows, student, temperature)

    monkeypatch.setattr(distillation.FullTeacher, "__call__", watch)
    case = Case()
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_loss(case.hidden, case.weight, case.full(), 10)["loss"].backward()
    assert seen == [10, 10, 10, 7]
    assert not any(WORDS in shape and TOKENS in shape for shape in saved)


def frozen_head(case: Case) -> None:
    case.weight.requires_grad_(False)


def frozen_student(case: Case) -> None:
    case.hidden.requires_grad_(False)


@pytest.mark.parametrize("freeze", [frozen_head, frozen_student])
def test_what_is_frozen_gets_no_gradient(freeze: Callable[[Case], None]) -> None:
    case = Case()
    freeze(case)
    linear_loss(case.hidden, case.weight, case.full(), 10)["loss"].backward()
    assert (case.weight.grad is None, case.hidden.grad is None) == (freeze is frozen_head, freeze is frozen_student)


def test_under_autocast_products_are_rounded_and_the_rest_is_not() -> None:
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = linear_loss(case.hidden, case.weight, case.full(), 10)
    rounded = torch.autograd.grad(made["loss"], case.inputs)
    exact = torch.autograd.grad(case.reference(), case.inputs)
    assert made["loss"].dtype == torch.float32 and made["loss"].item() == pytest.approx(case.reference().item(), rel=0.01)
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine.dtype == torch.float32 and 1e-5 < (mine - theirs).norm() / theirs.norm() < 0.02
