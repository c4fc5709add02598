"""Quantized first or last: with `requantize: true` what is left is a checkpoint of the same form, and it loads."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.scenarios.conftest import UNTRACKED, Run


def final(folder: Path, order: str) -> Path:
    """Folder of the model that the run of this order made."""
    reports: list[dict[str, Any]] = [json.loads(file.read_text()) for file in (folder / "outputs" / "runs").glob("*/*/report.json")]
    return next(Path(report["final"]["path"]) for report in reports if ",".join(report["order"]) == order)


def form(model: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor."""
    with safe_open(model / "model.safetensors", "np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  it is no mapping
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def test_an_order_that_quantizes_first_leaves_the_form_of_one_that_quantizes_last(run: Run, folder: Path) -> None:
    orders = ("prune,quantize", "quantize,prune")
    for order in orders:
        done = run("recipe=mine.yaml", f"order=[{order}]", "requantize=true", "stages.quantize.num_bits=3", UNTRACKED)
        assert done.code == 0, done.err
    assert "\nrequantize " in done.out
    last, first = (final(folder, order) for order in orders)
    assert last != first and form(last) == form(first) and any(name.endswith("weight_packed") for name in form(first))
    _, info = AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    assert not any(info.values())
