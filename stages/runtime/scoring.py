"""Score text with a resident model, and beside a reference model, without ever holding [tokens, vocabulary] for a whole batch.

Windows are padded on the right, where a causal model cannot look, so no mask is needed. The output embedding is applied to
chunks of tokens: float32 logits of 8 windows of 2,048 tokens over 128,256 words would take 8 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.functional.losses import token_kl_divergence, token_nll, top1_matches
from stages.runtime.windows import Window, chunk_tokens


@dataclass(frozen=True)
class TokenScores:
    """One entry for each scored token. The last three are None without a reference."""

    document: torch.Tensor  # int64
    nll: torch.Tensor  # float32, nats
    reference_nll: torch.Tensor | None
    kl: torch.Tensor | None  # KL(reference || model), nats
    top1: torch.Tensor | None  # bool


@torch.inference_mode()
def score_batch(batch: Sequence[Window], model: Any, reference: Any | None = None) -> TokenScores:
    """Losses of every scored token of the windows, on the CPU. Both models are on one device."""
    device = model.get_output_embeddings().weight.device
    width = max(len(window.ids) for window in batch)
    ids = torch.tensor([[*window.ids, *[0] * (width - len(window.ids))] for window in batch], device=device)
    lengths = torch.tensor([len(window.ids) - 1 for window in batch], device=device)
    scored = torch.arange(width - 1, device=device) < lengths[:, None]
    targets = ids[:, 1:][scored]
    hidden = hidden_states(model, ids[:, :-1])[scored]
    reference_hidden = None if reference is None else hidden_states(reference, ids[:, :-1])[scored]
    parts: dict[str, list[torch.Tensor]] = {"nll": [], "reference_nll": [], "kl": [], "top1": []}
    for chunk in torch.split(torch.arange(len(targets), device=device), chunk_tokens(model.config.vocab_size)):
        logits = model.get_output_embeddings()(hidden[chunk]).float()
        parts["nll"].append(token_nll(logits, targets[chunk]))
        if reference is not None and reference_hidden is not None:
            expected = reference.get_output_embeddings()(reference_hidden[chunk]).float()
            parts["reference_nll"].append(token_nll(expected, targets[chunk]))
            parts["kl"].append(token_kl_divergence(expected, logits))
            parts["top1"].append(top1_matches(expected, logits))
    document = torch.tensor([window.document for window in batch]).repeat_interleave(lengths.cpu())
    joined = {name: torch.cat(part).cpu() for name, part in parts.items() if part}
    return TokenScores(document, joined["nll"], joined.get("reference_nll"), joined.get("kl"), joined.get("top1"))


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[windows, length, hidden_size] as the output embedding takes them."""
    states: torch.Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first of each window: ids [windows, length] -> [windows * (length - 1)] float32."""
    return score_batch([Window(n, row) for n, row in enumerate(ids.tolist())], model).nll
