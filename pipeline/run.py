"""The way of one composed recipe: plan it, run it, report it, and say where the final model is.

A run's folder is `outputs/runs/<recipe>/<digest12>/`: recipe.yaml (composed), plan.json, report.json, report.html, report.md,
logs/, and `model`, a link to the final checkpoint in the store.
"""

import json
import os
import sys
import uuid
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from pipeline.collect import collect, using
from pipeline.errors import Interrupted, LlmpressError, PlanError, StoreError
from pipeline.executor import Listener, NodeResult, execute
from pipeline.export import check_export, export_model
from pipeline.graph import SOURCE_MODEL
from pipeline.pages import write_pages
from pipeline.plan import Plan, make_plan
from pipeline.plan_table import plan_json, print_plan
from pipeline.process import ForkServer
from pipeline.progress import Display
from pipeline.recipe import Recipe, Settings
from pipeline.report import Report, build_report
from pipeline.report_table import print_report
from pipeline.run_record import RunRecord
from pipeline.serving import write_serving
from pipeline.settled import settled_plan
from pipeline.store import SHORT, Store, check_writable, explain_os_error, write_whole
from pipeline.sweep.record import RunningJob
from pipeline.target import format_size, free_disk, has_gpu
from pipeline.tracking import Tracker, short_name

MOST_RUNS = 10  # that a collection names


def run_pipeline(
    recipe: Recipe, settings: Settings, composed: str, resources: Path, server: ForkServer, job: RunningJob | None = None
) -> dict[str, float]:
    """Do what `mode` says; returns the headline metrics (none for a plan).

    `composed` is the config as YAML; `server` starts the workers of every job of this process; `job` is the sweep's that this is, if any.
    """
    root = outputs_folder(settings)
    store = Store(root, settings.lock)
    if settings.mode == "run":
        recipe = replace(recipe, compute=recipe.machine.here())
    plan = make_plan(recipe, store, resources, execute=False)  # what is wrong is found before a long digest or download, or any writing
    if settings.mode == "plan":
        if settings.format == "json":
            print(json.dumps(plan_json(plan), indent=1))
        else:
            print_plan(plan, Console())
        _check_fit(plan, settings)
        return {}
    if not (recipe.model.path or recipe.model.id):
        raise PlanError("model: it is an architecture without weights, which can be planned but not run; give model.path=/folder")
    if settings.export_to:
        check_export(plan, export_folder(settings))
    _check_fit(plan, settings)
    check_writable(root)
    try:
        with using(store):
            plan = make_plan(recipe, store, resources, execute=True)
            _check_here(plan, store, settings)
            return _execute(plan, settings, store, composed, server, job)
    except OSError as error:
        raise StoreError(explain_os_error(error, root)) from None


def _check_fit(plan: Plan, settings: Settings) -> None:
    """PlanError where the plan says that it cannot run there or be served, unless the user wants it all the same."""
    if plan.problems and settings.fit == "refuse":
        raise PlanError([*plan.problems[:-1], f"{plan.problems[-1]}; or run it all the same: fit=warn"])
    for problem in plan.problems:
        print(f"warning: {problem}", file=sys.stderr)


def _check_here(plan: Plan, store: Store, settings: Settings) -> None:
    """PlanError where this machine lacks what the plan counts on: a GPU, or room on its disk."""
    problems = []
    machine, free = plan.recipe.machine, free_disk(store.root)
    if machine.cuda and any(node.memory.totals["vram"] for node in plan.to_run) and not has_gpu():
        problems.append(
            f"target: the plan is for the GPU of {machine.name} and this machine has none; run it there, or plan for this machine's "
            "processor: +target@compute=host"
        )
    if plan.disk > free:
        problems.append(
            f"outputs: what is to run takes {format_size(plan.disk)} of disk and {format_size(free)} are free in {store.root}; free some "
            "space (`run mode=gc` removes what no run uses) or choose another folder with outputs=..."
        )
    if problems and settings.fit == "refuse":
        raise PlanError(problems)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)


def outputs_folder(settings: Settings) -> Path:
    return Path(settings.outputs).expanduser().resolve()


def export_folder(settings: Settings) -> Path:
    return Path(settings.export_to or "").expanduser().absolute()


def collect_unused(settings: Settings) -> dict[str, float]:
    """`mode=gc`: say what was removed."""
    root = outputs_folder(settings)
    try:
        collected = collect(Store(root, settings.lock))
    except OSError as error:
        raise StoreError(explain_os_error(error, root)) from None
    for folder in collected.removed:
        print(f"removed {folder.name}")
    print(f"freed {format_size(collected.nbytes)}; {collected.kept} artifacts are used by runs and stay")
    for folder, nbytes in islice(collected.held.items(), MOST_RUNS):
        print(f"{format_size(nbytes):>8}  is used by {folder.relative_to(root)} alone: delete that folder, then run mode=gc frees it")
    return {}


def _execute(plan: Plan, settings: Settings, store: Store, composed: str, server: ForkServer, job: RunningJob | None) -> dict[str, float]:
    run_dir = store.root / "runs" / plan.recipe.name / plan.digest[:SHORT]
    run_dir.mkdir(parents=True, exist_ok=True)
    if job:
        job.planned(plan.digest, short_name(plan), run_dir)
    write_whole(run_dir / "recipe.yaml", composed)
    write_whole(run_dir / "plan.json", json.dumps(plan_json(plan), indent=1) + "\n")
    record = RunRecord(run_dir)
    tracker = Tracker(plan, settings.tracking, store.root, run_dir, str(job.folder) if job else "") if settings.tracking.enabled else None
    listeners: list[Listener] = [record, Display(label=job.label if job else ""), *([tracker] if tracker else [])]
    error: LlmpressError | None = None
    results: list[NodeResult] = []
    try:
        server.log = run_dir / "logs" / "forkserver.log"
        results = execute(plan, store, run_dir, listeners, server)
        plan = settled_plan(plan, [result.node for result in results])
        _link_model(plan, store, run_dir)
    except LlmpressError as caught:
        error = caught
    except OSError as caught:
        error = StoreError(explain_os_error(caught, store.root))
    except KeyboardInterrupt:
        error = Interrupted("interrupted after the last stage; the same command completes the run's folder")
    report = build_report(plan, record, error)
    report.write(run_dir)
    page = _write_pages(report, run_dir)
    if report.final:
        write_serving(run_dir, plan.final_spec, report.final.path, report.final_quality())
    _show(report, settings, tracker, page)
    if error is not None:
        raise error
    if settings.export_to:
        manifest = next(result.manifest for result in results if result.node.name == plan.final.node)
        export_model(plan, run_dir / "model", manifest, export_folder(settings), report.final_quality())
        print(f"export   {settings.export_to}", file=sys.stderr)
    return report.metrics


def _write_pages(report: Report, run_dir: Path) -> Path:
    """Where the report is as HTML; a plot that it lacks is told."""
    page, problems = write_pages(report, run_dir)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return page


def _show(report: Report, settings: Settings, tracker: Tracker | None, page: Path) -> None:
    """Hand the report to MLflow and print it."""
    line = tracker.finish(report) if tracker else ""
    if settings.format == "json":
        print(report.model_dump_json(indent=1))
        print(line, file=sys.stderr)
    else:
        print_report(report, Console(), line, page)


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
