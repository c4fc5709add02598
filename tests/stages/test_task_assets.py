"""The shipped tasks: built again they are the same; they ask what they say, of text that no model has been trained on."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stages.runtime.task_folder import check_folder
from stages.runtime.task_metrics import python_validity

ASSETS = Path(__file__).parents[2] / "assets"
TASKS = ("next_line", "bracket_close", "python_validity")


@pytest.fixture(scope="module")
def make_tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tasks", ASSETS / "make_tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ASSETS / file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    return {row["id"]: row["text"] for row in rows("data/eval.jsonl")}


def after(item: dict[str, Any], held_out: dict[str, str]) -> str:
    """What stands after the prompt in its module: the prompt occurs there, once."""
    before, prompt, rest = held_out[item["id"].partition(":")[0]].partition(item["prompt"])
    assert prompt and item["prompt"] not in before + rest
    return rest


def test_they_are_what_the_script_builds(make_tasks: ModuleType, held_out: dict[str, str]) -> None:
    built = make_tasks.build(list(held_out.items()))
    assert set(built) == set(TASKS) == {file.stem for file in (ASSETS / "tasks").glob("*.yaml")}
    for name, items in built.items():
        assert items == rows(f"tasks/{name}.jsonl")
        assert make_tasks.task_file(name) == (ASSETS / f"tasks/{name}.yaml").read_text(encoding="utf-8")
    check_folder(ASSETS / "tasks")


def test_nothing_of_them_is_text_to_train_or_calibrate_on() -> None:
    seen = "\n".join(row["text"] for split in ("train", "calibration") for row in rows(f"data/{split}.jsonl"))
    starts: dict[str, list[int]] = {}  # of every line, by what it begins with, as prompts begin with a line
    for place in (0, *(found.end() for found in re.finditer("\n", seen))):
        starts.setdefault(seen[place : place + 40], []).append(place)
    items = [item for name in TASKS for item in rows(f"tasks/{name}.jsonl")]
    assert not [item["id"] for item in items for at in starts.get(item["prompt"][:40], []) if seen.startswith(item["prompt"], at)]
    assert len(starts) > 10_000  # there was something to find them in


@pytest.mark.parametrize("name", ["next_line", "bracket_close"])
def test_the_right_choice_is_what_the_file_says_and_the_others_are_not(name: str, held_out: dict[str, str]) -> None:
    items = rows(f"tasks/{name}.jsonl")
    for item in items:
        choices, right, rest = item["choices"], item["choices"][item["answer"]], after(item, held_out)
        assert rest.startswith(right) and not any(rest.startswith(choice) for choice in choices if choice != right)
        assert len({choice.strip() for choice in choices}) == 4
    for place in range(4):
        assert 0.18 < sum(item["answer"] == place for item in items) / len(items) < 0.32  # not to be had by always saying the same
    assert len({item["id"] for item in items}) == len(items) >= 200


def test_the_held_out_body_itself_is_valid_and_an_empty_one_is_not(held_out: dict[str, str]) -> None:
    items = rows("tasks/python_validity.jsonl")
    assert len({item["id"] for item in items}) == len(items) >= 200
    for item in items:
        assert item["prompt"].endswith(item["function"])
        assert python_validity([item["function"]], [after(item, held_out)], min_statements=3) == 1.0, item["id"]
        assert python_validity([item["function"]], [" " * 12 + "pass\n"], min_statements=3) == 0.0
