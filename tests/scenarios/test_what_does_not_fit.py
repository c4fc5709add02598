"""What cannot fit is refused before anything is written, with exit code 3 and with what would fit instead."""

import json
from pathlib import Path

from tests.scenarios.conftest import UNTRACKED, Run

CARD = ["target.name=card", "target.gpus=1", "target.memory=1800MiB"]  # of which a gibibyte is kept for CUDA


def test_a_plan_that_does_not_fit_is_shown_and_refused(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "mode=plan", *CARD, "stages.evaluate.execution.batch_size=512")
    assert outcome.code == 3
    assert "evaluate@source" in outcome.out  # the table all the same
    (error,) = outcome.errors
    assert error.startswith("error: stages.evaluate: needs ")
    assert "what would fit: stages.evaluate.execution.batch_size=" in error and "fit=warn" in error
    assert not (folder / "outputs").exists()


def test_a_script_reads_the_same_from_json(run: Run) -> None:
    outcome = run("recipe=mine.yaml", "mode=plan", "format=json", *CARD, "stages.evaluate.execution.batch_size=512")
    assert outcome.code == 3
    problems = json.loads(outcome.out)["problems"]
    assert [problem["node"] for problem in problems] == ["evaluate"]
    assert all(problem["needed"] > problem["room"] == 1800 * 2**20 and problem["remedies"] for problem in problems)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "+serve={context:64,batch:1000000}", "target.name=tiny", "target.ram=4GiB")
    assert outcome.code == 3
    assert outcome.errors[0].startswith("error: serve: 1000000 x 64 tokens do not fit tiny")
    assert not (folder / "outputs").exists()


def test_a_plan_for_a_gpu_is_not_silently_run_on_a_processor(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "target=a100_80gb")
    assert outcome.code == 3
    assert outcome.errors == [
        "error: target: the plan is for the GPU of a100_80gb and this machine has none; run it there, or plan for this machine's "
        "processor: +target@compute=host"
    ]
    assert not (folder / "outputs" / "store").exists()
    assert run("recipe=mine.yaml", "target=a100_80gb", "+target@compute=host", UNTRACKED).code == 0


def test_who_knows_better_is_warned_and_obeyed(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", UNTRACKED, "fit=warn", "+serve={context:64,batch:1000000}", "target.name=tiny", "target.ram=4GiB")
    assert outcome.code == 0
    assert "warning: serve: 1000000 x 64 tokens do not fit tiny" in outcome.err
    assert (folder / "outputs" / "store").exists()
