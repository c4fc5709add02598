"""A sweep's own run in MLflow, the parent of its pipelines: written at the end, when there is a ranking."""

import subprocess
import time
from pathlib import Path

from pipeline import __version__
from pipeline.identity import digest
from pipeline.recipe import Settings
from pipeline.spool import FOLDER, Recorded, SweepEntry
from pipeline.sweep.page import FILES
from pipeline.sweep.record import Sweep
from pipeline.sweep.report import SweepReport, exit_code
from pipeline.sweep.table import markdown
from pipeline.tracking import PATIENCE, last_words, start_recorder
from pipeline.tracking_uri import chosen_uri, default_uri, is_recorded, place_of, where


def record_sweep(sweep: Sweep, report: SweepReport, settings: Settings) -> str:
    """Hand the report to a recorder and wait for it. Returns where to look, or what is wrong; never raises for MLflow's troubles."""
    outputs = Path(settings.outputs).expanduser().resolve()
    chosen, experiment = chosen_uri(settings.tracking), settings.tracking.experiment
    uri = chosen or default_uri(outputs)
    ended = [(job.digest, job.exit_code, job.error) for job in sweep.jobs]
    state = digest("sweep", {"version": __version__, "place": place_of(uri, experiment), "jobs": ended})
    if is_recorded(sweep.folder, uri, state):
        return where(chosen, outputs, Recorded.read(sweep.folder), "   (already recorded)", sweep.folder.name)
    log = sweep.folder / FOLDER / "recorder.log"
    try:
        _entry(sweep, report, state).write(sweep.folder)
        recorder = start_recorder(uri, experiment, outputs, log, ["--sweep", str(sweep.folder)])
    except OSError as error:
        return f"the sweep is not recorded: {error}"
    try:
        code = recorder.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return where(chosen, outputs, None, f"   (still writing, log {log})")
    if code:
        return f"the sweep is not recorded, to be tried again by the next: {last_words(log)} (log {log})"
    return where(chosen, outputs, Recorded.read(sweep.folder), view=sweep.folder.name)


def _entry(sweep: Sweep, report: SweepReport, state: str) -> SweepEntry:
    return SweepEntry(
        name=f"sweep of {report.recipe}: {len(sweep.jobs)} jobs",
        recipe=report.recipe,
        command=sweep.command,
        time=time.time(),
        exit_code=exit_code(sweep),
        metrics=report.metrics,
        note=markdown(report),
        artifacts=FILES,
        view=sweep.folder.name,
        state=state,
    )
