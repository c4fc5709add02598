"""A causal language model with the loss of its labels, in one module, as the training loop takes it."""

from typing import Any

import torch

from stages.functional.distillation import CrossEntropy, linear_loss
from stages.runtime.samples import NOT_COUNTED
from stages.runtime.training_settings import loss_chunk_tokens


class CausalLoss(torch.nn.Module):
    """Cross-entropy in nats, summed over the counted tokens; `model` is a transformers model with a decoder and an lm_head.

    Logits are made for counted tokens only, and chunk by chunk, from the decoder's hidden states.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each [samples, length], on the model's device; labels[t] is the target of position t, -100 where none counts."""
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        counted, head = labels != NOT_COUNTED, self.model.lm_head.weight
        return linear_loss(hidden[counted], head, CrossEntropy(labels[counted]), loss_chunk_tokens(len(head)))
