"""A budget of bits through the real command: a bound in the plan before the measurement, exact after it, and what stands on disk."""

import json
from pathlib import Path
from typing import Any

from pipeline.headers import tensor_table
from tests.scenarios.conftest import UNTRACKED, Run

BUDGET = "stages.quantize.mixed_precision.budget_bits"


def recipe(folder: Path, model: Path) -> None:
    (folder / "mixed.yaml").write_text(
        f"""# Bits where they matter.
defaults:
  - /stage@stages.sensitivity: sensitivity
  - /stage@stages.quantize: rtn
  - /stage@stages.kv_cache: kv_cache
  - _self_
order: [sensitivity, quantize, kv_cache]
model: {{path: {model}}}
data: {{splits: {{calibration: data/calibration.txt}}}}
stages:
  sensitivity: {{choices: [3, 4, 8], group_size: 64, num_samples: 2, max_length: 32}}
  quantize: {{mixed_precision: {{budget_bits: 4.5, choices: [3, 4, 8]}}, group_size: 64, inputs: {{sensitivity: sensitivity}}}}
"""
    )


def nodes(plan: str) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in json.loads(plan)["nodes"]}


def planned_bytes(node: dict[str, Any]) -> int:
    return int(node["outputs"]["model"]["bytes"])


def test_a_budget_of_bits_is_planned_measured_and_kept(run: Run, folder: Path, model: Path) -> None:
    recipe(folder, model)
    plan = run("recipe=mixed.yaml", "mode=plan", "format=json")
    before = nodes(plan.out)
    assert plan.code == 0 and all(node["bound"] for node in before.values()), plan.err
    assert "sizes are the most that the budget allows" in " ".join(before["quantize"]["notes"])

    done = run("recipe=mixed.yaml", UNTRACKED)
    assert done.code == 0, done.err
    assert "planned  bytes exact" in done.out and "of 4.5 bits per weight: qkv_proj " in done.out
    (file,) = (folder / "outputs" / "runs").glob("*/*/report.json")
    report = json.loads(file.read_text())
    on_disk = sum(entry.nbytes for entry in tensor_table(file.parent / "model").values())
    assert report["metrics"]["nbytes"] == on_disk <= planned_bytes(before["kv_cache"])
    assert report["final"]["num_bits"] is None and len({width for row in report["layer_bits"] for width in row["bits"]}) > 1
    assert "plot of bits" in (file.parent / "report.html").read_text()

    after = nodes(run("recipe=mixed.yaml", "mode=plan", "format=json").out)
    assert {(node["status"], node["bound"]) for node in after.values()} == {("hit", False)}
    assert planned_bytes(after["quantize"]) == planned_bytes(after["kv_cache"]) == on_disk
    assert [after[name]["key"] for name in after] == [before[name]["key"] for name in after]

    changed = nodes(run("recipe=mixed.yaml", "mode=plan", "format=json", f"{BUDGET}=5.5").out)
    assert (changed["sensitivity"]["status"], changed["quantize"]["status"]) == ("hit", "miss")
    assert not changed["quantize"]["bound"] and planned_bytes(changed["quantize"]) > on_disk


def test_a_budget_that_cannot_be_is_refused_in_one_sentence_before_any_work(run: Run, folder: Path, model: Path) -> None:
    recipe(folder, model)
    budget = run("recipe=mixed.yaml", f"{BUDGET}=3")
    assert budget.code == 2 and budget.errors == [
        "error: stages.quantize.mixed_precision.budget_bits: 3 is less than the 3.25 that 3 bits take everywhere, scales counted; write "
        "more than 3.25, or allow fewer bits in choices"
    ]
    both = run("recipe=mixed.yaml", "stages.quantize.mixed_precision.choices=[4]", "stages.sensitivity.choices=[4,4]")
    assert both.code == 2 and len(both.errors) == 2 and all("choices: " in line for line in both.errors), both.err
    assert not (folder / "outputs" / "store").exists()
