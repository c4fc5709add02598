"""Every shipped recipe's plan, and every stage's version beside the fingerprint of its code."""

import io
import json
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from pipeline import compose
from pipeline.plan import make_plan
from pipeline.plan_table import print_plan
from pipeline.recipe import read_config
from pipeline.stage import BUILT_IN, find_stage
from pipeline.stage_code import fingerprint
from pipeline.store import Store
from tests import golden


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize("name", [file.stem for file in compose.recipe_files()])
def test_the_plan_of_a_recipe(name: str, tmp_path: Path) -> None:
    compose.register()
    with initialize_config_dir(str(compose.resources() / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("config", [f"recipe={name}"]), resolve=True)
    assert isinstance(config, dict)
    recipe, _ = read_config({str(key): value for key, value in config.items()}, name)
    output = io.StringIO()
    print_plan(make_plan(recipe, Store(tmp_path), compose.resources(), execute=False), Console(file=output, width=100))
    golden.check(f"plan_{name}.txt", "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n")


def test_an_author_decides_whether_a_change_of_code_changes_results() -> None:
    """A differing fingerprint: if results change, raise the stage's `version`; then update this golden in the same commit."""
    rows = {name: {"version": find_stage(name).version, "fingerprint": fingerprint(find_stage(name).__module__)} for name in BUILT_IN}
    golden.check("stages.json", json.dumps(rows, indent=1) + "\n")
