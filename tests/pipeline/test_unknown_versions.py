"""A machine that only plans: where a stage's library is not installed, its key is unknown, the rest of the plan is not."""

import io
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import compose, identity
from pipeline.errors import PlanError
from pipeline.executor import execute
from pipeline.identity import backend_versions, library_version, not_installed
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json, print_plan
from pipeline.store import Store
from tests.pipeline.shipped import plan_of_shipped, shipped_recipe

LAPTOP = ["quickstart", "order=[prune,quantize,kv_cache,evaluate]", "data_check=null"]


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Torch, as on a machine that never installed it. What was found out about libraries is forgotten before and after."""

    def absent(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(identity, "version", absent)
    library_version.cache_clear()
    yield monkeypatch
    library_version.cache_clear()


def told(plan: Plan) -> dict[str, tuple[str, str]]:
    return {node.name: (node.status, node.reason) for node in plan.nodes}


def test_a_stage_whose_library_is_not_installed_is_planned_without_a_key(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    plan = plan_of_shipped(tmp_path, *LAPTOP)
    assert told(plan) == {node.name: ("unknown", "torch is not installed here") for node in plan.nodes} and plan.nodes
    assert {node.key for node in plan.nodes} == {""} and plan.source.key
    rows = plan_json(plan)["nodes"]
    assert {(row["status"], row["key"]) for row in rows} == {("unknown", "")}
    assert all(row["memory"]["ram"] for row in rows if row["name"] != "kv_cache")


def test_everything_but_keys_is_planned_as_where_the_library_is_installed(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    blind = plan_of_shipped(tmp_path, *LAPTOP)
    no_torch.undo()
    library_version.cache_clear()
    seeing = plan_of_shipped(tmp_path, *LAPTOP)
    assert {node.status for node in seeing.nodes} == {"miss"}
    assert [(node.expected, node.memory, node.notes) for node in blind.nodes] == [
        (node.expected, node.memory, node.notes) for node in seeing.nodes
    ]


def test_what_follows_a_stage_without_a_key_is_pending(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    """`kv_cache` that needs no library of its own, behind `prune`, which needs torch."""
    from stages.kv_cache import KVCache

    no_torch.setattr(KVCache, "libraries", ())
    plan = plan_of_shipped(tmp_path, "quickstart", "order=[prune,kv_cache]", "data_check=null")
    assert told(plan) == {
        "prune": ("unknown", "torch is not installed here"),
        "kv_cache": ("pending", "follows prune, which has no key here"),
    }
    alone = plan_of_shipped(tmp_path, "quickstart", "order=[kv_cache]", "data_check=null")
    assert told(alone)["kv_cache"][0] == "miss" and alone.nodes[0].key


def test_the_table_says_why_a_key_is_unknown_and_not_that_a_digest_is_pending(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    print_plan(plan_of_shipped(tmp_path, *LAPTOP), Console(file=output, width=120))
    text = output.getvalue()
    assert "  unknown: torch is not installed here: " in text and "pending" not in text


def test_a_recipe_whose_library_is_not_installed_is_refused_before_anything_is_opened(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    recipe = shipped_recipe("quickstart", "order=[prune,quantize]", "model.path=/absent")
    with pytest.raises(PlanError) as refused:
        make_plan(recipe, Store(tmp_path / "outputs"), compose.resources(), execute=True)
    instead = "so that it can be planned but not run; install what llmpress depends on, or write mode=plan"
    assert refused.value.problems == [f"stages.{name}: torch is not installed here, {instead}" for name in ("prune", "quantize")]


def test_the_executor_takes_no_plan_with_unknown_keys(tmp_path: Path, no_torch: pytest.MonkeyPatch) -> None:
    plan = plan_of_shipped(tmp_path, *LAPTOP)
    with pytest.raises(PlanError, match=r"^stages\.hidden_states@source: torch is not installed here, so that"):
        execute(plan, Store(tmp_path / "outputs"), tmp_path / "run")
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "run").exists()


def test_several_libraries_are_named_together_and_no_version_is_made_up() -> None:
    assert not_installed(["pydantic", "no-such-thing", "another-thing"]) == "another-thing and no-such-thing are not installed here"
    assert not_installed(["pydantic"]) == ""
    with pytest.raises(PackageNotFoundError, match="no-such-thing"):
        backend_versions(["pydantic", "no-such-thing"])
    assert backend_versions(["pydantic"]) == {"pydantic": version("pydantic")}
