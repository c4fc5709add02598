"""`mode=plan`: the plan printed, and what stands against it told. What a run does besides, pipeline/run.py, is not imported for it."""

import json
import sys
from pathlib import Path

from rich.console import Console

from pipeline.errors import PlanError
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json, print_plan
from pipeline.recipe import Recipe, Settings
from pipeline.store import Store


def show_plan(recipe: Recipe, settings: Settings, resources: Path) -> None:
    """PlanError, after it is printed, where the plan does not fit and `fit` is not `warn`."""
    plan = make_plan(recipe, Store(outputs_folder(settings), settings.lock), resources, execute=False)
    if settings.format == "json":
        print(json.dumps(plan_json(plan), indent=1))
    else:
        print_plan(plan, Console())
    check_fit(plan, settings)


def check_fit(plan: Plan, settings: Settings) -> None:
    """PlanError where the plan says that it cannot run there or be served, unless the user wants it all the same."""
    if plan.problems and settings.fit == "refuse":
        raise PlanError([*plan.problems[:-1], f"{plan.problems[-1]}; or run it all the same: fit=warn"])
    for problem in plan.problems:
        print(f"warning: {problem}", file=sys.stderr)


def outputs_folder(settings: Settings) -> Path:
    return Path(settings.outputs).expanduser().resolve()
