"""A recipe whose quantizer is a library that cannot share llmpress's environment, from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.envs import lock_digest

pytestmark = pytest.mark.extras
ROOT = Path(__file__).parents[2]
RECIPE = """
defaults: [{/stage@stages.quantize: gptq}, _self_]
order: [quantize]
stages: {quantize: {group_size: 64, num_samples: 8, max_length: 64, backend: auto_gptq}}
"""


def test_it_is_built_run_recorded_and_found_again(tmp_path: Path) -> None:
    recipe, outputs = tmp_path / "isolated.yaml", tmp_path / "outputs"
    recipe.write_text(RECIPE)
    outputs.mkdir()
    (ROOT / "outputs" / "envs").mkdir(parents=True, exist_ok=True)
    (outputs / "envs").symlink_to(ROOT / "outputs" / "envs")  # one that another test has built is not built again
    command = [sys.executable, "-m", "pipeline", f"recipe={recipe}", f"outputs={outputs}", "tracking.enabled=false"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (folder,) = (outputs / "store").glob("gptq-*")
    manifest = json.loads((folder / "artifact.json").read_text())
    assert manifest["backend"] == {"legacy": lock_digest("legacy")}
    assert manifest["environment"]["isolated.transformers"] == "4.51.3"
    assert manifest["environment"]["transformers"].startswith("5."), "what comes before and after runs in llmpress's own"
    shimmed = any("was made for a GPU and this machine has none" in note for note in manifest["notes"])
    assert shimmed == (not torch.cuda.is_available()) and ("was made for a GPU" in done.stdout) == shimmed
    assert manifest["tensor_bytes"] == sum(each["bytes"] for each in planned(command)[0]["outputs"].values()), "bytes as planned"
    assert not list(folder.glob("backend*")) and (folder / "tokenizer.json").is_file()
    assert [node["status"] for node in planned(command)] == ["hit"]


def planned(command: list[str]) -> list[dict]:
    return json.loads(subprocess.check_output([*command, "mode=plan", "format=json"], cwd=ROOT))["nodes"]
