"""What counts as the same result: identical on a CPU, within a rounding on a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import FileRecord, Manifest
from tests.gpu.agreement import ROUNDING, Made, agreement
from tests.gpu.measure import disagreement


def made(folder: Path, stage: str, content: bytes, nll: float = 800.0, metrics: dict[str, float] | None = None) -> Made:
    """Of a report with two documents of 100 tokens; `nll` is the first one's, in all."""
    documents: list[dict[str, Any]] = [
        {"id": "one", "tokens": 100, "nll": nll, "reference_nll": None, "kl": None},
        {"id": "two", "tokens": 100, "nll": 700.0, "reference_nll": 650.0, "kl": 3.0},
    ]
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"documents": documents}))
    name = "report.json" if stage == "evaluate" else "model.safetensors"
    manifest = Manifest(
        type="", key="", stage=stage, version=1, params={}, inputs={}, backend={}, metrics=metrics or {}, environment={}, execution={},
        files={name: FileRecord(nbytes=len(content), sha256=content.decode())}, fingerprint="", seconds=1.0, peak_rss=0, created="",
    )  # fmt: skip
    return Made(stage, folder, manifest, "bf16")


@pytest.mark.parametrize(
    ("change", "on_gpu", "agrees"),
    [(0.0, False, True), (0.1, False, False), (0.1, True, True), (0.4, True, False), (float("nan"), True, False)],
)
def test_losses_agree_by_document(tmp_path: Path, change: float, on_gpu: bool, agrees: bool) -> None:
    one, other = made(tmp_path / "one", "evaluate", b"a"), made(tmp_path / "other", "evaluate", b"b", 800.0 + change)
    found = agreement(one, other, on_gpu)
    assert found["difference"] == pytest.approx(change / 100, nan_ok=True) and not found["identical"]
    assert found["allowed"] == (ROUNDING["bf16"] if on_gpu else 0.0)
    assert (disagreement({"with": "other", **found}) == []) == agrees


def test_trainings_agree_in_their_first_update(tmp_path: Path) -> None:
    one = made(tmp_path / "one", "distill", b"a", metrics={"first_train_loss": 2.5, "train_loss": 2.0})
    other = made(tmp_path / "other", "distill", b"b", metrics={"first_train_loss": 2.51, "train_loss": 2.1})
    found = {"with": "other", **agreement(one, other, on_gpu=True)}
    (problem,) = disagreement(found)
    assert problem == "differs from other by 0.01 (nats per token in the first update), 0.00391 is allowed"


@pytest.mark.parametrize("content", [b"a", b"b"])
def test_rounded_weights_are_the_same_files_on_a_gpu_too(tmp_path: Path, content: bytes) -> None:
    found = agreement(made(tmp_path / "one", "gptq", b"a"), made(tmp_path / "other", "gptq", content), on_gpu=True)
    assert found["identical"] == (content == b"a") == (disagreement({"with": "other", **found}) == [])
