"""What the backends have in common: their calibration windows, how far they are, and the losses of what they made."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.stage import Context

Windows = list[list[int]]


def read_windows(file: str) -> Windows:
    """Token ids, all windows of one length, so that no library has anything to pad, cut or drop."""
    windows: Windows = json.loads(Path(file).read_text())
    return windows


def follow_layers(ctx: Context, layers: Any) -> None:
    """Report a decoder layer as reached when it first computes."""
    total, seen = len(layers), set[int]()

    def reached(number: int) -> None:
        if number not in seen:
            seen.add(number)
            ctx.progress("quantizing layer", len(seen), total)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: reached(number))


@torch.no_grad()
def own_losses(model: Any, window: list[int]) -> list[float]:
    """Of every token but the first, [length - 1] in nats, as the library's own kernels compute the model."""
    ids = torch.tensor([window], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    losses: list[float] = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return losses
