"""What Hydra answered once is answered again without it, exactly as long as it would answer the same."""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from pipeline import cli, learned, remembered, with_hydra
from pipeline.errors import LlmpressError
from pipeline.learned import Composed, Learned, learned_config, recall_config
from pipeline.remembered import cache_folder

PLAN = ["recipe=mine.yaml", "mode=plan"]
RECIPE = "# Mine.\ndefaults:\n  - /stage@stages.quantize: rtn\n  - _self_\norder: [quantize]\nstages:\n  quantize: {num_bits: 8}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a cache of one's own; files that were just written count as old, so that tests need not wait."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED", -1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    (tmp_path / "mine.yaml").write_text(RECIPE)
    learned._installation.cache_clear()
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command that Hydra was asked about."""
    commands: list[list[str]] = []
    ask = with_hydra.command

    def command(arguments: list[str]) -> int:
        commands.append(arguments)
        GlobalHydra.instance().clear()
        return ask(arguments)

    monkeypatch.setattr(with_hydra, "command", command)
    return commands


def run(*arguments: str) -> str:
    """What it prints. Errors are part of it."""
    learned._installation.cache_clear()
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            cli._main(list(arguments))
        except LlmpressError as error:
            return f"error: {error}"
        except SystemExit as ended:
            assert not ended.code, err.getvalue()
    return out.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [["recipe=quickstart", "mode=plan"], ["recipe=mine.yaml", "mode=plan", "stages.quantize.num_bits=4"], ["--help"],
     ["recipe=iterative_prune_distill", "--help"], ["recipe=./mine.yaml", "-h"], ["mode=plan", "recipe=70b_to_single_a100", "target=a10g"]],
)  # fmt: skip
def test_the_same_is_answered_without_hydra(asked: list[list[str]], arguments: list[str]) -> None:
    first = run(*arguments)
    assert len(asked) == 1 and first
    assert run(*arguments) == first and len(asked) == 1


def test_a_config_is_remembered_as_it_was_composed(asked: list[list[str]]) -> None:
    assert recall_config(PLAN) is None
    run(*PLAN)
    found = recall_config(PLAN)
    assert isinstance(found, Composed) and found.recipe == "mine" and found.content["stages"]["quantize"]["num_bits"] == 8
    assert found.text == "" and not found.on_other_machines and "hydra" not in found.content


@pytest.mark.parametrize(
    "arguments",
    [["recipe=mine.yaml", "mode=plan", "outputs=${oc.env:HOME}"], ["recipe=mine.yaml", "--cfg", "job"],
     ["recipe=mine.yaml", "mode=plan", "hydra.verbose=false"], ["recipe=mine.yaml", "mode=plan", "stages.quantize.num_bit=8"]],
)  # fmt: skip
def test_what_depends_on_more_than_files_or_fails_is_asked_again(asked: list[list[str]], arguments: list[str]) -> None:
    assert run(*arguments) == run(*arguments) and len(asked) == 2


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def replace(file: Path, content: str) -> None:
    """By another file, of the same times."""
    other, before = file.with_suffix(".other"), file.stat()
    other.write_text(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the installed llmpress."""
    for file in ("conf/model/small.yaml", "recipes/quick.yaml", "pipeline/plan.py", "stages/runtime/deep/code.py"):
        (tmp_path / "site" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / file).write_text("a: 1\n")
    monkeypatch.setattr(learned, "CODE", tmp_path / "site")
    monkeypatch.setattr(learned, "resources", lambda: tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    (tmp_path / "packages").mkdir()
    return tmp_path / "site"


CHANGES: dict[str, Callable[[Path], object]] = {
    "a config": lambda site: edit(site / "conf/model/small.yaml", "1", "2"),
    "a recipe": lambda site: edit(site / "recipes/quick.yaml", "1", "2"),
    "a module of the program": lambda site: edit(site / "pipeline/plan.py", "1", "2"),
    "a module deep in the stages": lambda site: edit(site / "stages/runtime/deep/code.py", "1", "2"),
    "another file in its place": lambda site: replace(site / "recipes/quick.yaml", "a: 2"),
    "a new recipe": lambda site: (site / "recipes/new.yaml").write_text("a: 1"),
    "a removed config": lambda site: (site / "conf/model/small.yaml").unlink(),
    "a renamed config": lambda site: (site / "conf/model/small.yaml").rename(site / "conf/model/tiny.yaml"),
    "an installed package": lambda site: (site.parent / "packages" / "new-1.0.dist-info").mkdir(),
    "the recipe that is named": lambda site: edit(site.parent / "mine.yaml", "8", "4"),
    "the recipe that is named, gone": lambda site: (site.parent / "mine.yaml").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_below_it_is_asked_again(site: Path, change: str) -> None:
    Learned("config", PLAN).keep({"answer": 1})
    learned._installation.cache_clear()
    assert Learned("config", PLAN).recall() == {"answer": 1}
    CHANGES[change](site)
    learned._installation.cache_clear()
    assert Learned("config", PLAN).recall() is None


def test_what_changed_a_moment_ago_is_not_remembered(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED", 10**12)
    learned._installation.cache_clear()
    Learned("config", PLAN).keep(1)
    assert Learned("config", PLAN).recall() is None


def test_a_recipe_that_is_exchanged_while_it_is_composed_is_not_kept_as_what_came_after(
    asked: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that is set to another file between the reading of the recipe and the composing."""
    (folder / "eight.yaml").write_text(RECIPE)
    (folder / "four.yaml").write_text(RECIPE.replace("num_bits: 8", "num_bits: 4"))
    link, is_sweep = folder / "link.yaml", with_hydra.compose.is_sweep
    link.symlink_to("eight.yaml")

    def exchange(arguments: list[str]) -> bool:
        link.unlink()
        link.symlink_to("four.yaml")
        return is_sweep(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(with_hydra.compose, "is_sweep", exchange)
        before = run("recipe=link.yaml", "mode=plan")
    after = run("recipe=link.yaml", "mode=plan")
    assert before != after and len(asked) == 2
    assert run("recipe=link.yaml", "mode=plan") == after and len(asked) == 2


def test_arguments_in_another_order_are_other_arguments() -> None:
    Learned("config", ["mode=plan", "mode=run"]).keep(1)
    assert Learned("config", ["mode=run", "mode=plan"]).recall() is None


@pytest.mark.parametrize("answer", [{1: 2}, (1, 2), float("nan")])
def test_what_json_does_not_give_back_is_not_kept(answer: object) -> None:
    Learned("config", PLAN).keep(answer)
    assert Learned("config", PLAN).recall() is None


@pytest.mark.parametrize("content", ["", "{", json.dumps({"form": 1, "entries": {json.dumps(PLAN): ["[1, 2]", 1]}})])
def test_a_damaged_memory_is_asked_again(asked: list[list[str]], content: str) -> None:
    first = run(*PLAN)
    (file,) = cache_folder().glob("config-*.json")
    file.write_text(content)
    assert run(*PLAN) == first and len(asked) == 2


def test_a_home_that_cannot_be_written_is_no_problem(asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine.yaml"))
    assert run(*PLAN) == run(*PLAN) and len(asked) == 2


def test_stages_of_other_packages_are_asked_for_again() -> None:
    config = Composed({"stages": {"a": {"stage": "rtn"}, "b": {"stage": "low_rank"}}}, "mine")
    learned.keep_config(learned_config(PLAN), config)
    assert recall_config(PLAN) is None
    learned.keep_config(learned_config(PLAN), Composed({"stages": {"a": {"stage": "rtn"}}}, "mine"))
    assert recall_config(PLAN) is not None
