"""A plan is made while one waits: `python bench/plan.py` prints the figures that these bounds leave room above."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import compose
from pipeline.model_config import CONFIGS
from pipeline.plan import make_plan
from pipeline.spec import ModelSpec
from pipeline.stage import find_stage
from pipeline.store import Store
from tests.pipeline.shipped import shipped_recipe
from tests.yardsticks import command_seconds, import_seconds, work_seconds

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "mlflow", "llmcompressor", "compressed_tensors", "numpy", "safetensors", "peft", "bitsandbytes")
COMMAND = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\nfrom pipeline.cli import main\nmain()"
SPARSE = {  # 128 experts in each of 48 layers: 18,673 Linear layers
    "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip


def test_the_70b_recipe_is_planned_in_a_fraction_of_what_imports_take(tmp_path: Path) -> None:
    recipe, store = shipped_recipe("70b_to_single_a100"), Store(tmp_path)
    planning = work_seconds(lambda: make_plan(recipe, store, compose.resources(), execute=False), repeats=6)
    assert planning < 0.25 * import_seconds()


def test_the_command_plans_in_a_few_times_what_its_imports_take_and_imports_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND, "recipe=70b_to_single_a100", "mode=plan", f"outputs={tmp_path / 'outputs'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "8 x 32,768 tokens fit a100_80gb" in done.stdout, done.stderr
    assert command_seconds(command, tmp_path, environment, repeats=3) < 3 * import_seconds()


def test_a_recipe_that_was_never_composed_here_takes_twice_that_at_most(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "recipe=70b_to_single_a100", "mode=plan", f"outputs={tmp_path / 'outputs'}"]
    command_seconds(command, ROOT, repeats=1)
    times = [command_seconds(command, ROOT, {**os.environ, "XDG_CACHE_HOME": str(tmp_path / str(n))}, repeats=1) for n in range(3)]
    assert min(times) < 6 * import_seconds()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("recipe=quickstart", "--help")])
def test_what_there_is_to_choose_from_is_told_in_less_than_the_imports_take(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # another test that keeps its answer at the same time may cost this one its own
    monkeypatch.delenv("PYTHONPATH", raising=False)  # with the stages of tests/toys the help of a recipe is not remembered
    assert command_seconds([sys.executable, "-m", "pipeline", *arguments], ROOT, repeats=3) < import_seconds()


def test_thousands_of_experts_are_packed_without_building_their_names() -> None:
    assert SPARSE["model_type"] in CONFIGS
    rtn = find_stage("rtn").from_dict({"ignore": ["lm_head", "model.layers.3.self_attn.q_proj"]})
    many, few = ({**SPARSE, "num_experts": experts} for experts in (128, 8))
    packed = rtn.infer(model=ModelSpec.from_config(many))
    assert sum(group.count for group in packed.linear_groups) == 48 * (4 + 3 * 128) + 1
    dense = [name for group in packed.linear_groups if group.format.is_dense for name in group.module_names]
    assert sorted(dense) == ["lm_head", "model.layers.3.self_attn.q_proj"]
    times = [work_seconds(lambda config=config: rtn.infer(model=ModelSpec.from_config(config)), repeats=20) for config in (many, few)]
    assert times[0] < 2 * times[1]
