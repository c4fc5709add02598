"""docs/plan.md and plan.json have the same fields."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.plan_table import PLAN_SCHEMA, plan_json
from tests.pipeline.shipped import plan_of_shipped

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
NAMED_BY_RECIPE = {"nodes[].params", "nodes[].inputs", "nodes[].derived", *(f"nodes[].memory.{place}" for place in ("ram", "vram", "disk"))}
PORTS = "nodes[].outputs"


def documented(page: str) -> set[str]:
    """Every field with its place: the heading, then each name in the first column of the table below it."""
    fields, place = set(), ""
    for line in page.splitlines():
        if line.startswith("## "):
            place = line.removeprefix("## ")
        elif line.startswith("| `"):
            names = re.findall(r"`([^`]+)`", line.split("|")[1])
            fields |= {name if place == "plan.json" else f"{place}.{name}" for name in names}
    return fields


def written(value: Any, place: str = "") -> Iterator[str]:
    """Every field of a plan with its place; what a recipe names is not a field."""
    if isinstance(value, list):
        for item in value:
            yield from written(item, f"{place}[]")
    elif isinstance(value, dict) and place not in NAMED_BY_RECIPE:
        for name, item in value.items():
            spot = f"{place}.<port>" if place == PORTS else f"{place}.{name}".lstrip(".")
            if place != PORTS:
                yield spot
            yield from written(item, spot)


def test_every_field_of_a_plan_is_documented_and_every_documented_field_is_written(tmp_path: Path) -> None:
    """Plans that between them have logits, an adapter, a load that fits and one that does not, a stage that cannot run, an environment."""
    untrainable = ["405b_to_h100_nvl", "order=[prune,recover]", "+stage@stages.recover=qlora", "stages.recover.num_samples=192"]
    isolated = ["13b_to_rtx4090", "stages.quantize.backend=gptqmodel", "stages.quantize.execution.offload=ram"]
    plans = [plan_json(plan_of_shipped(tmp_path, *asked)) for asked in (["70b_to_single_a100"], untrainable, isolated)]
    found = {field for plan in plans for field in written(plan)}
    told = documented(PAGE.read_text())
    assert sorted(found - told) == [], "docs/plan.md lacks them"
    assert sorted(told - found) == [], "docs/plan.md tells of them and no plan has them"


def test_the_page_is_of_this_schema() -> None:
    assert f"`schema_version` is {PLAN_SCHEMA};" in PAGE.read_text()


def test_a_field_that_is_not_in_its_place_is_found() -> None:
    page = "## plan.json\n| field | meaning |\n| `a`, `b` | x |\n## b[]\n| `c` | `not a field` |\n"
    assert documented(page) == {"a", "b", "b[].c"} == set(written({"a": 1, "b": [{"c": None}]}))
    assert documented(page) != set(written({"a": 1, "b": {"c": None}}))
