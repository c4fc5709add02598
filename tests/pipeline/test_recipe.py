"""From plain config to Recipe: what is refused, in which words, and that all of it is said at once."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import check_document, read_config, resolve_path


def config(**changes: Any) -> dict[str, Any]:
    return {
        "order": ["quantize"],
        "stages": {"quantize": {"stage": "rtn", "num_bits": 4}},
        "model": {"path": "folder"},
        "target": {"name": "host"},
    } | changes


def problems(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_config(config(**changes), "test")
    return caught.value.problems


def test_a_plain_config_becomes_a_frozen_recipe() -> None:
    recipe, settings = read_config(config(mode="plan", serve={"context": 4096}), "test")
    assert recipe.order == ("quantize",)
    assert recipe.stages["quantize"].stage.params.num_bits == 4
    assert recipe.serve and recipe.serve.batch == 1
    assert recipe.target.ram and recipe.target.ram > 2**30
    assert settings.mode == "plan"
    with pytest.raises(AttributeError):
        recipe.order = ()  # type: ignore[misc]


def test_every_problem_is_told_at_once_with_its_place_and_a_close_match() -> None:
    stages = {"quantize": {"stage": "rtn", "num_bits": 5, "group_sise": 64}, "prune": {"stage": "structured_prun"}, "none": {}}
    told = problems(stages=stages, ordr=1, serve={"context": 0}, convert="maybe", model={})
    assert told[0] == "ordr: there is no such setting; did you mean 'order'?"
    assert "stages.quantize.group_sise: there is no such parameter; did you mean 'group_size'?" in told
    assert any(line.startswith("stages.quantize.num_bits: 5 does not fit; input should be 2, 3, 4 or 8") for line in told)
    assert "stages.prune.stage: stage 'structured_prun' does not exist; did you mean 'structured_prune'?" in told
    assert any(line.startswith("stages.none.stage: which stage is it? there are:") for line in told)
    assert "model: nothing to compress; give model.path=/folder or model.id=org/name" in told
    assert any(line.startswith("serve.context: 0 does not fit") for line in told)
    assert "convert: 'maybe' is not a choice; write auto or never" in told
    assert len(told) == 8


@pytest.mark.parametrize("order", [None, [], "prune", [1]])
def test_an_order_is_a_list_of_names(order: Any) -> None:
    assert problems(order=order)[0].startswith("order: a recipe needs a list of its stages")


@pytest.mark.parametrize("name", ["model", "data", "a@2", "a.b"])
def test_names_that_references_could_not_tell_apart_are_refused(name: str) -> None:
    assert "cannot be a stage's name" in problems(stages={name: {"stage": "rtn"}})[0]


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"hydra": {"launcher": {"_target_": "os.system"}}}, "cannot set `hydra`"),
        ({"hydra/launcher": "x"}, "cannot set `hydra`"),
        ({"defaults": [{"override hydra/launcher": "joblib"}]}, "cannot set `hydra`"),
        ({"defaults": ["hydra/launcher"]}, "cannot choose `hydra` groups"),
        ({"stages": {"a": {"_target_": "os.system"}}}, "cannot name code"),
        ({"stages": [{"deep": [{"_target_": "x"}]}]}, "cannot name code"),
        ({"outputs": "${oc.env:HOME}"}, "only plain references"),
        ({"outputs": "${oc.env:${name}}"}, "only plain references"),
        ({"a": {"b": "x ${now:%Y} y"}}, "only plain references"),
    ],
)
def test_a_hostile_recipe_is_refused_before_it_is_composed(document: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        check_document(document, "evil.yaml")


def test_plain_references_within_a_recipe_are_read() -> None:
    check_document({"a": 1, "b": "${a}", "c": "${x.y[0]} and ${a}", "defaults": [{"/stage@stages.a": "rtn"}, "_self_"]}, "good.yaml")


def test_assets_are_the_files_that_the_product_ships(tmp_path: Path) -> None:
    assert resolve_path("assets:small-llama", tmp_path) == tmp_path / "assets" / "small-llama"
    assert resolve_path("some/folder", tmp_path) == Path("some/folder")
