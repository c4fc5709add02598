"""The main way: a recipe runs, and running it again, changed or reordered, does only what is new."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests.scenarios.conftest import ROOT, UNTRACKED, Run
from tests.yardsticks import command_seconds, import_seconds


def report(folder: Path) -> dict[str, Any]:
    """The newest report."""
    files = sorted((folder / "outputs" / "runs").glob("*/*/report.json"), key=lambda file: file.stat().st_mtime_ns)
    content: dict[str, Any] = json.loads(files[-1].read_text())
    return content


def statuses(folder: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in report(folder)["stages"]}


def test_a_recipe_runs_and_again_it_is_all_hits_and_a_change_runs_only_what_follows(run: Run, folder: Path) -> None:
    first = run("recipe=mine.yaml")
    assert first.code == 0, first.err
    ran = {"hidden_states@source": "ran", "evaluate@source": "ran", "prune": "ran", "quantize": "ran", "evaluate": "ran"}
    assert statuses(folder) == ran
    for word in ("source", "perplexity", "from_pretrained", "mlflow ui --backend-store-uri"):
        assert word in first.out

    final = Path(report(folder)["final"]["path"])
    _, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(info.values())

    again = run("recipe=mine.yaml")
    assert statuses(folder) == dict.fromkeys(ran.keys() - {"hidden_states@source"}, "hit"), "what only spares work is not asked for"
    assert "already recorded" in again.out

    changed = run("recipe=mine.yaml", "stages.quantize.group_size=32", "export_to=exported")
    assert changed.code == 0
    assert statuses(folder) == {**dict.fromkeys(ran, "hit"), "quantize": "ran", "evaluate": "ran"}
    assert "base_model:" in (folder / "exported" / "README.md").read_text()
    assert not (folder / "exported" / "artifact.json").exists()

    plan = run("recipe=mine.yaml", "mode=plan", "stages.quantize.num_bits=3")
    assert "to run (params.num_bits: 4 -> 3): quantize" in plan.out

    reordered = run("recipe=mine.yaml", "order=[quantize,prune,evaluate]")
    assert statuses(folder)["dequantize"] == "ran"
    assert "prune needs dense weights and quantize.model is quantized" in reordered.out
    assert "the rounding error is now baked into dense weights" in reordered.out


def test_a_broken_stage_names_its_log_and_the_next_run_continues(run: Run, folder: Path) -> None:
    failed = run("recipe=mine.yaml", UNTRACKED, "stages.quantize.execution.memory_limit=1KiB")
    assert failed.code == 4
    assert "quantize: ran out of memory" in failed.errors[0] and "log.txt" in failed.errors[0]
    before = ("hidden_states@source", "evaluate@source", "prune")
    assert statuses(folder) == {**dict.fromkeys(before, "ran"), "quantize": "failed", "evaluate": "not reached"}
    assert run("recipe=mine.yaml", UNTRACKED).code == 0
    assert statuses(folder) == {**dict.fromkeys(before, "hit"), "quantize": "ran", "evaluate": "ran"}


def test_scripts_read_json_from_standard_output(run: Run) -> None:
    plan = json.loads(run("recipe=mine.yaml", "mode=plan", "format=json").out)
    assert [node["name"] for node in plan["nodes"]] == ["hidden_states@source", "evaluate@source", "prune", "quantize", "evaluate"]
    assert json.loads(run("recipe=mine.yaml", "format=json", UNTRACKED).out)["verdict"] == "complete"


def test_run_alone_lists_the_recipes_and_help_the_groups(run: Run) -> None:
    assert re.search(r"^  quickstart +Everything llmpress does to a model", run().out, re.MULTILINE)
    text = run("--help").out
    for word in ("structured_prune", "gptq", "a100_80gb", "quickstart", "group_size=64"):
        assert word in text


def test_planning_imports_nothing_heavy(run: Run, folder: Path) -> None:
    heavy = ("torch", "transformers", "mlflow", "llmcompressor", "compressed_tensors", "numpy", "safetensors")
    assert run("recipe=mine.yaml", "mode=plan", blocked=heavy).code == 0
    assert not (folder / "outputs").exists()
    plan = [sys.executable, "-m", "pipeline", "recipe=quickstart", "mode=plan", f"outputs={folder / 'outputs'}"]
    assert command_seconds(plan, ROOT, repeats=3) < 3 * import_seconds()


def test_gc_removes_what_no_run_uses(run: Run, folder: Path) -> None:
    assert run("recipe=mine.yaml", "order=[prune]", UNTRACKED).code == 0
    assert run("recipe=mine.yaml", "order=[quantize]", UNTRACKED).code == 0
    kept = run("mode=gc")
    assert kept.code == 0 and "freed 0 B; 2 artifacts are used by runs and stay" in kept.out
    told = [line.split() for line in kept.out.splitlines() if "alone: delete that folder" in line]
    assert sorted(line[5] for line in told) == sorted(
        f"runs/{plan.parent.parent.name}/{plan.parent.name}" for plan in (folder / "outputs/runs").glob("*/*/plan.json")
    )
    for plan in (folder / "outputs" / "runs").glob("*/*/plan.json"):
        if json.loads(plan.read_text())["order"] == ["quantize"]:
            shutil.rmtree(plan.parent)
    assert "removed rtn-" in run("mode=gc").out
    assert [path.name.partition("-")[0] for path in (folder / "outputs" / "store").iterdir()] == ["structured_prune"]


def test_a_sweep_shares_what_its_jobs_have_in_common(run: Run, folder: Path) -> None:
    outcome = run("-m", "recipe=mine.yaml", "stages.quantize.num_bits=4,8", "order=[prune,quantize]", UNTRACKED)
    assert outcome.code == 0, outcome.err
    names = sorted(path.name.partition("-")[0] for path in (folder / "outputs" / "store").iterdir())
    assert names == ["rtn", "rtn", "structured_prune"]


def test_ctrl_c_ends_a_sweep_and_not_only_its_running_job(folder: Path) -> None:
    arguments = ["-m", "recipe=mine.yaml", "stages.quantize.num_bits=4,8", "order=[quantize,evaluate]", UNTRACKED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as sweep:
        assert sweep.stderr is not None
        while "started" not in sweep.stderr.readline():
            assert sweep.poll() is None
        sweep.send_signal(signal.SIGINT)
        _, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 130
    assert "Traceback" not in errors
    assert len(list((folder / "outputs" / "runs" / "mine").iterdir())) == 1
