"""The way of one composed recipe: plan it, run it, report it, and say where the final model is.

A run's folder is `outputs/runs/<recipe>/<digest12>/`: recipe.yaml (composed), plan.json, report.json, logs/, and `model`, a link to the
final checkpoint in the store.
"""

import json
import os
import sys
import uuid
from pathlib import Path

from rich.console import Console

from pipeline.collect import collect, using
from pipeline.errors import Interrupted, LlmpressError, PlanError, StoreError
from pipeline.executor import Listener, NodeResult, execute
from pipeline.export import check_export, export_model
from pipeline.graph import SOURCE_MODEL
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json, print_plan
from pipeline.process import ForkServer
from pipeline.progress import Display
from pipeline.recipe import Recipe, Settings
from pipeline.report import Report, RunRecord, build_report
from pipeline.report_table import print_report
from pipeline.serving import write_serving
from pipeline.store import SHORT, Store, check_writable, explain_os_error, write_whole
from pipeline.target import format_size
from pipeline.tracking import Tracker


def run_pipeline(recipe: Recipe, settings: Settings, composed: str, resources: Path, server: ForkServer, sweep: str) -> dict[str, float]:
    """Do what `mode` says; returns the headline metrics (none for a plan).

    `composed` is the config as YAML; `server` starts the workers of every job of this process; `sweep` names the sweep it belongs to.
    """
    root = outputs_folder(settings)
    store = Store(root)
    plan = make_plan(recipe, store, resources, execute=False)  # what is wrong is found before a long digest or download, or any writing
    if settings.mode == "plan":
        if settings.format == "json":
            print(json.dumps(plan_json(plan), indent=1))
        else:
            print_plan(plan, Console())
        return {}
    if not (recipe.model.path or recipe.model.id):
        raise PlanError("model: it is an architecture without weights, which can be planned but not run; give model.path=/folder")
    if settings.export_to:
        check_export(plan, export_folder(settings))
    check_writable(root)
    try:
        with using(store):
            return _execute(make_plan(recipe, store, resources, execute=True), settings, store, composed, server, sweep)
    except OSError as error:
        raise StoreError(explain_os_error(error, root)) from None


def outputs_folder(settings: Settings) -> Path:
    return Path(settings.outputs).expanduser().resolve()


def export_folder(settings: Settings) -> Path:
    return Path(settings.export_to or "").expanduser().absolute()


def collect_unused(settings: Settings) -> dict[str, float]:
    """`mode=gc`: say what was removed."""
    root = outputs_folder(settings)
    try:
        collected = collect(Store(root))
    except OSError as error:
        raise StoreError(explain_os_error(error, root)) from None
    for folder in collected.removed:
        print(f"removed {folder.name}")
    print(f"freed {format_size(collected.nbytes)}; {collected.kept} artifacts are used by runs and stay")
    return {}


def _execute(plan: Plan, settings: Settings, store: Store, composed: str, server: ForkServer, sweep: str) -> dict[str, float]:
    run_dir = store.root / "runs" / plan.recipe.name / plan.digest[:SHORT]
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "recipe.yaml", composed)
    write_whole(run_dir / "plan.json", json.dumps(plan_json(plan), indent=1) + "\n")
    record = RunRecord(run_dir)
    tracker = Tracker(plan, settings.tracking, store.root, run_dir, sweep) if settings.tracking.enabled else None
    listeners: list[Listener] = [record, Display(), *([tracker] if tracker else [])]
    error: LlmpressError | None = None
    results: list[NodeResult] = []
    try:
        server.log = run_dir / "logs" / "forkserver.log"
        results = execute(plan, store, run_dir, listeners, server)
        _link_model(plan, store, run_dir)
    except LlmpressError as caught:
        error = caught
    except OSError as caught:
        error = StoreError(explain_os_error(caught, store.root))
    except KeyboardInterrupt:
        error = Interrupted("interrupted after the last stage; the same command completes the run's folder")
    report = build_report(plan, record, error)
    report.write(run_dir)
    if report.final:
        write_serving(run_dir, plan.final_spec, report.final.path, report.final_quality())
    _show(report, settings, tracker)
    if error is not None:
        raise error
    if settings.export_to:
        manifest = next(result.manifest for result in results if result.node.name == plan.final.node)
        export_model(plan, run_dir / "model", manifest, export_folder(settings), report.final_quality())
        print(f"export   {settings.export_to}", file=sys.stderr)
    return report.metrics


def _show(report: Report, settings: Settings, tracker: Tracker | None) -> None:
    """Hand the report to MLflow and print it."""
    line = tracker.finish(report) if tracker else ""
    if settings.format == "json":
        print(report.model_dump_json(indent=1))
        print(line, file=sys.stderr)
    else:
        print_report(report, Console(), line)


def _link_model(plan: Plan, store: Store, run_dir: Path) -> None:
    """`model` in the run's folder, replaced in one step."""
    if plan.final == SOURCE_MODEL:
        target = plan.source.path.resolve()
    else:
        node = next(node for node in plan.nodes if node.name == plan.final.node)
        place = store.path(node.stage.name, node.key)
        target = place if len(node.types) == 1 else place / plan.final.port
    temporary = run_dir / f".model-{uuid.uuid4().hex}"
    temporary.symlink_to(os.path.relpath(target, run_dir))
    temporary.replace(run_dir / "model")
