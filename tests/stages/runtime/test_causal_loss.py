"""The loss of a micro batch: what transformers would compute, summed, whatever is padded or not counted."""

from pathlib import Path

import pytest
import torch

from stages.runtime import causal_loss
from stages.runtime.causal_loss import CausalLoss
from stages.runtime.loading import load_model
from stages.runtime.samples import as_sample, collate
from tests.stages.models import make_checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_the_sum_and_its_gradient_are_those_of_transformers(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_loss, "loss_chunk_tokens", lambda vocab_size: 7)  # several chunks
    model = load_model(make_checkpoint(tmp_path / "model", dtype=torch.float32, num_hidden_layers=2, tie_word_embeddings=tied))
    long, short = list(range(3, 43)), list(range(50, 61))
    asked = [i % 3 > 0 for i in range(len(long))]
    ours = CausalLoss(model)(**collate([as_sample(long, asked), as_sample(short)]))["loss"]
    ours.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    labels = torch.tensor([token if counts else -100 for token, counts in zip(long, asked, strict=True)])
    theirs = sum(
        model(ids[None], labels=target[None]).loss * target[1:].ne(-100).sum()
        for ids, target in ((torch.tensor(long), labels), (torch.tensor(short), torch.tensor(short)))
    )
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_without_a_counted_token_has_no_loss(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "model", num_hidden_layers=1))
    loss = CausalLoss(model)(**collate([as_sample([3, 4, 5], [False] * 3)]))["loss"]
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
