"""Hydra's messages as one sentence that says what to write; `-m` anywhere; a recipe's title."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose


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
