"""Hydra's messages as one sentence that says what to write; `-m` anywhere; a recipe's title."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose, config_source
from pipeline.errors import RecipeError
from pipeline.stage import BUILT_IN


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    compose.register()
    with initialize_config_dir(str(compose.resources() / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("models.large.path=/a", "models.large: it is not there yet; to add it write +models.large.path=/folder"),
        ("data.splits.chats=/a.jsonl", "data.splits.chats: it is not there yet; to add it write +data.splits.chats=/file.jsonl"),
        (
            "stages.distill.inputs.train=data.calibration",
            "stages.distill.inputs.train: it is not there yet; to add it write +stages.distill.inputs.train=...",
        ),
        ("stages.distill.lora.rank=8", "stages.distill.lora.rank: it is not there yet; to add it write +stages.distill.lora.rank=..."),
        ("stages.distill.alfa=1", "stages.distill.alfa: there is no such setting; did you mean 'alpha'?"),
        ("distill.alpha=1", "distill: a stage's settings stand under `stages`; write stages.distill..."),
        ("quickstart", "quickstart: this is not `key=value`; write recipe=quickstart"),
        ("a b", "a b: this is not `key=value`; quote values that hold spaces, commas or brackets"),
        ("recipe=./mine", "recipe: there is no './mine'; the name of a recipe's file ends in .yaml"),
    ],
)
def test_what_hydra_refuses_is_told_with_what_to_write(override: str, sentence: str) -> None:
    recipe = [] if override.startswith("recipe=") else ["recipe=quickstart"]
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        hydra_compose("config", [*recipe, override])
    assert str(compose.explain(caught.value)) == sentence


def test_the_flag_of_a_sweep_may_stand_anywhere() -> None:
    assert compose.take_recipe_files(["recipe=quickstart", "-m", "convert=auto,never"]) == ["-m", "recipe=quickstart", "convert=auto,never"]


def test_the_sweeper_over_orders_needs_no_flag() -> None:
    assert compose.take_recipe_files(["recipe=quickstart", "hydra/sweeper=orders"]) == ["-m", "recipe=quickstart", "hydra/sweeper=orders"]
    assert "-m" not in compose.take_recipe_files(["recipe=quickstart", "hydra/sweeper=orders", "--info"])


def test_a_recipe_is_listed_with_its_first_sentence_whole() -> None:
    listed = compose.recipe_list()
    for file in compose.recipe_files():
        row = next(line for line in listed.splitlines() if line.startswith(f"  {file.stem} "))
        assert row.endswith(".")


def test_a_title_ends_where_the_comment_does(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# One, of 3.5\n# lines. Two.\norder: []  # no\n")
    assert compose._title(file) == "One, of 3.5 lines."


def test_no_stage_is_imported_but_those_of_the_recipe() -> None:
    code = "from pipeline import compose\ncompose.register()\ncompose.composed(['recipe=mixed_precision'])\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.removeprefix("stages.") for name in done.stdout.split() if name.startswith("stages.")}
    content = config_source.read_recipe(compose.resources() / "recipes" / "mixed_precision.yaml")
    used = {
        str(name) for entry in content["defaults"] if isinstance(entry, dict) for key, name in entry.items() if key.startswith("/stage@")
    }
    assert imported & set(BUILT_IN) == used


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("order: [a\n", "is not readable YAML"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- a\n", "is not a mapping"),
        ("text\n", "is not a mapping"),
        ("\x00", "is not readable YAML"),
    ],
)
def test_a_recipe_that_is_no_yaml_mapping_is_one_sentence(tmp_path: Path, written: str, told: str) -> None:
    (tmp_path / "mine.yaml").write_text(written)
    with pytest.raises(RecipeError, match=told) as caught:
        config_source.read_recipe(tmp_path / "mine.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [*compose.recipe_files(), *(compose.resources() / "conf").rglob("*.yaml")], ids=lambda file: file.stem)
def test_files_are_read_as_omegaconf_reads_them(file: Path) -> None:
    fast, plain = (yaml.load(file.read_text(), Loader=loader) for loader in (config_source._loader(), get_yaml_loader()))
    assert fast == plain and fast == OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def test_numbers_and_words_are_what_omegaconf_takes_them_for() -> None:
    text = "[1e-3, 1_000, 0x1f, 010, 1:30, 2024-01-01, .5, yes, on, ~, null, 1.e5, .inf, '1', \"\\u00e9\", 3.5e+2]"
    assert yaml.load(text, Loader=config_source._loader()) == yaml.load(text, Loader=get_yaml_loader())


def test_nodes_reach_another_process_as_what_they_are_made_of() -> None:
    """A launcher hands the store to its workers."""
    repo = ConfigStore.instance().repo
    for group, name in (("stage", "awq"), ("recipe", "quickstart")):
        node = repo[group][f"{name}.yaml"]
        sent = pickle.dumps(node)
        assert len(sent) < 500 and pickle.loads(sent).node == node.node


def test_a_composition_leaves_the_nodes_as_they_were() -> None:
    node = ConfigStore.instance().repo["stage"]["awq.yaml"].node
    before = OmegaConf.to_container(node)
    config = hydra_compose("config", ["recipe=70b_to_single_a100", "stages.quantize.group_size=32"])
    assert config.stages.quantize.group_size == 32 and OmegaConf.to_container(node) == before
