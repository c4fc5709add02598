"""Do two rows that must come to the same result come to it?

On a CPU they do so bit by bit. On a GPU kernels may add in another order, after which everything computed from there may round the
other way: a logit of 1 to 2 is rounded to 2^-8 of it in bf16 (8 significant bits), and its token's loss moves by as much. The errors
of tokens do not point the same way, so that the mean over a document's tokens has to stay below one such rounding; a layer that is
skipped, or called with another mask, moves it by ten times that and more.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import Manifest

ROUNDING = {"bf16": 2.0**-8, "fp32": 2.0**-16}  # nats for each token of a document, by the dtype of the computation
LOSSES = ("nll", "reference_nll", "kl")  # sums of nats over a document's tokens; None without a reference


@dataclass(frozen=True)
class Made:
    """What a row left in the store."""

    stage: str
    path: Path
    manifest: Manifest
    dtype: str | None  # of its products; None: it has none


def agreement(one: Made, other: Made, on_gpu: bool) -> dict[str, Any]:
    """`difference` beside what is `allowed`, of `what`; `identical`: bit by bit."""
    what, difference = COMPARED_BY[one.stage](one, other)
    return {
        "what": what,
        "difference": difference,
        "allowed": ROUNDING[one.dtype] if on_gpu and one.stage != "gptq" else 0.0,
        "identical": weights_and_reports(one) == weights_and_reports(other),
    }


def weights_and_reports(made: Made) -> dict[str, str]:
    """sha256 by file, of what a stage computes."""
    return {name: record.sha256 for name, record in made.manifest.files.items() if name.endswith((".safetensors", "report.json"))}


def losses(one: Made, other: Made) -> tuple[str, float]:
    pairs = zip(documents(one), documents(other), strict=True)
    gaps = [abs(a[loss] - b[loss]) / a["tokens"] for a, b in pairs for loss in LOSSES if a[loss] is not None]
    return "nats per token in the document that differs most", max(gaps)


def documents(made: Made) -> list[dict[str, Any]]:
    return list(json.loads((made.path / "report.json").read_bytes())["documents"])


def training_losses(one: Made, other: Made) -> tuple[str, float]:
    """Of the first update alone: each later one has grown out of the roundings of those before it."""
    name = "first_train_loss"
    return "nats per token in the first update", abs(one.manifest.metrics[name] - other.manifest.metrics[name])


def files(one: Made, other: Made) -> tuple[str, float]:
    mine, its = weights_and_reports(one), weights_and_reports(other)
    return "files that differ", float(sum(mine.get(name) != its.get(name) for name in mine | its))


COMPARED_BY: dict[str, Callable[[Made, Made], tuple[str, float]]] = {"evaluate": losses, "distill": training_losses, "gptq": files}
