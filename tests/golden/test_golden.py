"""Every shipped recipe's plan, and every stage's version beside the fingerprint of its code."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import compose
from pipeline.plan import Plan
from pipeline.plan_table import print_plan
from pipeline.stage import BUILT_IN, find_stage
from pipeline.stage_code import fingerprint
from tests import golden
from tests.pipeline.shipped import plan_of_shipped


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """`host` has as many cores as this machine, and its hours follow them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize("name", [file.stem for file in compose.recipe_files()])
def test_the_plan_of_a_recipe(name: str, tmp_path: Path) -> None:
    golden.check(f"plan_{name}.txt", printed(plan_of_shipped(tmp_path, name)))


def test_the_plan_on_a_processor_without_units_for_bf16(tmp_path: Path) -> None:
    golden.check("plan_quickstart_in_fp32.txt", printed(plan_of_shipped(tmp_path, "quickstart")))


def printed(plan: Plan) -> str:
    output = io.StringIO()
    print_plan(plan, Console(file=output, width=100))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def test_an_author_decides_whether_a_change_of_code_changes_results() -> None:
    """A differing fingerprint: if results change, raise the stage's `version`; then update this golden in the same commit."""
    rows = {name: {"version": find_stage(name).version, "fingerprint": fingerprint(find_stage(name).__module__)} for name in BUILT_IN}
    golden.check("stages.json", json.dumps(rows, indent=1) + "\n")
