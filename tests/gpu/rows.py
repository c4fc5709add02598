"""What is run on the card: one stage a row, on a random Llama or on what an earlier row made of it.

Each is a recipe of its own, in an outputs folder of its own: a row that fails takes none with it but those that need its result, and
what changes no result, such as `mode: layerwise`, is computed again instead of being found in the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DENSE = "dense"  # the random model itself


@dataclass(frozen=True)
class Sizes:
    """`model` is a name of bench/memory.py, `layers` how many it has here; `documents` None: all of the held-out text."""

    model: str
    layers: int
    windows: int
    max_length: int
    documents: int | None


SIZES = {
    "300M": Sizes("300M", layers=20, windows=64, max_length=512, documents=None),
    "tiny": Sizes("tiny", layers=2, windows=4, max_length=64, documents=2),  # to rehearse the rows, not to measure anything
}


@dataclass(frozen=True)
class Row:
    """`model` and `beside` (by port) name what it reads: the dense model, or the row that made it. `equals` names the row whose result
    it must come to in its own way."""

    name: str
    stage: str
    params: Mapping[str, Any] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)
    model: str = DENSE
    beside: Mapping[str, str] = field(default_factory=dict)
    equals: str = ""

    @property
    def needs(self) -> set[str]:
        """The rows whose results it reads."""
        return {self.model, *self.beside.values()} - {DENSE}

    def recipe(self, models: Mapping[str, str], data: Mapping[str, str], target: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe, as Hydra would have composed it; `models` are folders by row, `data` files by split."""
        inputs = {port: f"models.{port}" for port in self.beside}
        stage = {"stage": self.stage, **self.params, "execution": dict(self.execution), "inputs": inputs}
        return {
            "order": [self.stage],
            "stages": {self.stage: stage},
            "model": {"path": models[self.model]},
            "models": {port: {"path": models[name]} for port, name in self.beside.items()},
            "data": {"splits": dict(data)},
            "target": dict(target),
        }


def rows(sizes: Sizes) -> tuple[Row, ...]:
    """In the order they run, what others need first."""
    windows = {"num_samples": sizes.windows, "max_length": sizes.max_length}
    cut = {"head_ratio": 0.25, "mlp_ratio": 0.25}
    training = {**windows, "global_batch_size": max(2, sizes.windows // 8), "warmup_ratio": 0.0}
    micro = {"micro_batch_size": max(1, sizes.windows // 16)}
    distill = {"params": training, "model": "prune by activation", "beside": {"teacher": DENSE}}
    return (
        *evaluations(sizes, DENSE),
        *evaluations(sizes, DENSE, "fp32"),  # beside what a GPU computes fastest
        Row("prune by magnitude", "structured_prune", cut),
        Row("prune by activation", "structured_prune", cut | windows | {"importance": "activation"}),
        Row("distill", "distill", execution=micro, **distill),
        Row("distill, gradient checkpointing", "distill", execution=micro | {"gradient_checkpointing": True}, equals="distill", **distill),
        Row("rtn", "rtn"),
        *evaluations(sizes, "rtn"),
        Row("gptq", "gptq", windows),
        Row("gptq, offloaded to disk", "gptq", windows, {"offload": "disk"}, equals="gptq"),
        *evaluations(sizes, "gptq"),
    )


def evaluations(sizes: Sizes, model: str, compute_dtype: str = "auto") -> tuple[Row, Row]:
    """Resident and layer by layer; of what was made of the dense model, beside it."""
    name = f"evaluate {model}" + ("" if compute_dtype == "auto" else f" in {compute_dtype}")
    params = {"max_length": sizes.max_length, "max_documents": sizes.documents, "compute_dtype": compute_dtype}
    beside = {} if model == DENSE else {"reference": DENSE}
    return (
        Row(name, "evaluate", params, model=model, beside=beside),
        Row(f"{name}, layer by layer", "evaluate", params, {"mode": "layerwise"}, model, beside, equals=name),
    )
