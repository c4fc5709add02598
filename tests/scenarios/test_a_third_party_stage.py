"""The package of docs/add_a_stage.md, installed as anyone's would be, works in a recipe like a stage that llmpress ships."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.runtime.tensors import TensorReader
from tests.scenarios.conftest import ROOT, UNTRACKED, Run

PACKAGE = ROOT / "tests" / "plugin_package"
GUIDE = ROOT / "docs" / "add_a_stage.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, put there by pip, which needs no network for that."""
    copy = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "package")
    site = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check")
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def run_with_plugin(run: Run, site: Path) -> Callable[..., Any]:
    return partial(run, env={"PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))})


def guide_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_guide_quotes_the_package_as_it_is() -> None:
    assert guide_blocks("toml") == [(PACKAGE / "pyproject.toml").read_text()]
    assert guide_blocks("python") == [(PACKAGE / name).read_text() for name in ("llmpress_low_rank.py", "test_low_rank.py")]


def test_the_guides_recipe_runs_with_it_and_again_it_is_all_hits(
    run_with_plugin: Callable[..., Any], run: Run, folder: Path, model: Path
) -> None:
    (recipe,) = guide_blocks("yaml")
    (folder / "mine.yaml").write_text(recipe)
    arguments = ("recipe=mine.yaml", f"model.path={model}", "data.splits={eval: data/eval.txt}", UNTRACKED)
    assert "low_rank" in run_with_plugin("--help").out

    first = run_with_plugin(*arguments)
    assert first.code == 0, first.err
    assert "ranks kept of 128: " in first.out
    report = json.loads(next((folder / "outputs" / "runs").glob("*/*/report.json")).read_text())
    assert {stage["name"]: stage["status"] for stage in report["stages"]} == dict.fromkeys(
        ("hidden_states@source", "evaluate@source", "low_rank", "evaluate"), "ran"
    )
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (torch.linalg.svdvals(TensorReader(path).read(name).float()) for path in (model, Path(report["final"]["path"])))
    kept = (before**2).cumsum(0) / (before**2).sum() < 0.9
    rank = int(kept.sum()) + 1
    assert rank < 128 and after[rank] < 0.05 * after[rank - 1], "what is left below the rank is rounding"

    again = run_with_plugin(*arguments)
    newest = max((folder / "outputs" / "runs").glob("*/*/report.json"), key=lambda file: file.stat().st_mtime_ns)
    assert again.code == 0 and {stage["status"] for stage in json.loads(newest.read_text())["stages"]} == {"hit"}

    wrong = run_with_plugin(*arguments, "stages.low_rank.energy=1.5")
    assert wrong.code == 2 and wrong.errors == ["error: stages.low_rank.energy: 1.5 does not fit; input should be less than 1"]
    missing = run(*arguments)
    assert missing.code == 2 and "low_rank" in missing.errors[0], "without the package there is no such stage"
