"""A training stage that is killed goes on from its last checkpoint, and ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import toys
from tests.scenarios.conftest import ROOT, UNTRACKED, Run
from tests.stages.models import TEXT

STAGES = {
    "distill": "{stage: distill, inputs: {teacher: model}, learning_rate: 0.01",
    "qlora": "{stage: qlora, rank: 4, learning_rate: 0.01",
}


@pytest.fixture
def recipe(folder: Path, request: pytest.FixtureRequest) -> str:
    (folder / "data" / "train.txt").write_text("<|endoftext|>".join(f"train {i}: " + " ".join(TEXT) for i in range(40)))
    content = STAGES[request.param] + ", num_samples: 40, max_length: 32, global_batch_size: 4, execution: {checkpoint_minutes: 0}}"
    written = (folder / "mine.yaml").read_text().partition("stages:")[0].split("order:")
    model = written[1].partition("model:")[2].replace("eval: ", "train: data/train.txt, eval: ")
    (folder / "mine.yaml").write_text(f"order: [tune]\nmodel:{model}stages:\n  tune: {content}\n")
    return "mine.yaml"


def artifact(folder: Path, outputs: str) -> tuple[Path, dict[str, Any]]:
    (file,) = (folder / outputs / "store").glob("*/artifact.json")
    return file.parent, json.loads(file.read_text())


@pytest.mark.parametrize("recipe", ["distill", pytest.param("qlora", marks=pytest.mark.slow)], indirect=True)
def test_a_training_that_is_killed_ends_where_it_would_have_ended(run: Run, folder: Path, recipe: str) -> None:
    assert run(f"recipe={recipe}", "outputs=whole", UNTRACKED).code == 0
    command = [sys.executable, "-m", "pipeline", f"recipe={recipe}", "outputs=broken", UNTRACKED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    scratch = folder / "broken" / "scratch"
    toys.wait_until(lambda: any(int(path.name[11:]) > 2 for path in scratch.glob("*/training/checkpoint-*")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list((folder / "broken" / "store").glob("*"))

    again = run(f"recipe={recipe}", "outputs=broken", UNTRACKED)
    assert again.code == 0, again.err
    place, manifest = artifact(folder, "broken")
    assert manifest["resumes"] == 1
    assert "tune: continues an interrupted attempt from update" in again.err
    assert "continued an interrupted attempt from update" in again.out and "of 10" in again.out
    expected, reference = artifact(folder, "whole")
    assert reference["resumes"] == 0 and not list(place.rglob("training")) and not os.listdir(scratch)
    for file in expected.rglob("*.safetensors"):
        one, other = load_file(file), load_file(place / file.relative_to(expected))
        assert one.keys() == other.keys()
        assert max((one[name].float() - other[name].float()).abs().max().item() for name in one) < 1e-6
