"""`python -m pipeline.recorder`: a process of its own that writes spools to MLflow. Only here is mlflow imported (1.2 CPU s).

What a person finds in MLflow:

    experiment <name>           pipeline `prune>distill>gptq4` (> under its sweep, if any)
                                    1 prune, 2 quantize, 3 evaluate: a light run each, hit or ran, with its final metrics
    experiment <name>-stages    every execution of a stage once, however many pipelines share it: curves, planned and measured

A pipeline is found again by its recipe digest, an execution by attempt and node, so replaying a spool doubles nothing.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mlflow.entities import Metric

from pipeline.artifact import MANIFEST
from pipeline.destination import Destination, legal, milliseconds, parameter, points
from pipeline.spool import FOLDER, Recorded, SweepEntry, follow, spools
from pipeline.tracking_uri import place_of

DOCUMENTS = ("*.yaml", "*.json", "report.html", "report.md")  # of the run's folder: composed recipe, plan.json, report.json
STATUS = {"complete": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}  # by verdict
STAGE_STATUS = {"ran": "FINISHED", "hit": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


@dataclass
class Attempt:
    """One spool on its way into MLflow."""

    to: Destination
    name: str  # of the spool: identifies the attempt
    header: dict[str, Any]

    def __post_init__(self) -> None:
        self.last = self.started = self.header["time"]
        self.executions: dict[str, str] = {}  # by node: its run, while it is running
        self.curves: dict[str, list[Metric]] = {}  # by node: points that are not written yet
        self.ended = False
        self.sweep = self.to.open_sweep(self.header["sweep"], self.started) if self.header["sweep"] else ""
        self.pipeline = self._open_pipeline()

    def _open_pipeline(self) -> str:
        header, identity = self.header, {"llmpress.kind": "pipeline", "llmpress.digest": self.header["digest"]}
        params = {legal(name): parameter(value) for name, value in header["params"].items()}
        found = self.to.find(self.to.pipelines, identity)
        logged = found.data.params if found else {}
        if any(params.get(name, value) != value for name, value in logged.items()):
            identity["llmpress.params"] = self.name  # a default changed since: MLflow cannot change a parameter, so a run of its own
            logged = {}
        run = self.to.run(self.to.pipelines, identity, header["name"], self.started)
        tags = {"llmpress.recipe": header["recipe"], "llmpress.path": header["run_dir"]}
        if self.sweep:
            tags["mlflow.parentRunId"] = self.sweep
        self.to.log_params(run, {name: value for name, value in params.items() if name not in logged})
        self.to.log_tags(run, tags)
        return run

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        """Write what a batch of events means; kinds that are only for the terminal are passed over."""
        actions = {
            "node_started": self._started,
            "curve": self._curve,
            "node_finished": self._finished,
            "node_hit": self._hit,
            "node_failed": self._failed,
            "end": self._end,
        }
        for event in events:
            self.last = event.get("time", self.last)
            if event["event"] in actions:
                actions[event["event"]](event)
        for node in list(self.curves):
            self._flush(node)

    def _started(self, event: dict[str, Any]) -> None:
        node = self.header["nodes"][event["node"]]
        identity = {"llmpress.attempt": self.name, "llmpress.node": event["node"]}
        run = self.to.run(self.to.stages, identity, node["short"], event["time"])
        tags = {"llmpress.kind": "stage", "llmpress.recipe": self.header["recipe"], "llmpress.pipeline_run_id": self.pipeline}
        params = {"stage": node["stage"], "version": node["version"], **node["params"]}
        self.to.log_params(run, params)
        self.to.log_tags(run, tags)
        self.to.log_metrics(run, node["planned"], event["time"])
        self.executions[event["node"]] = run

    def _curve(self, event: dict[str, Any]) -> None:
        if event["node"] in self.executions:
            self.curves.setdefault(event["node"], []).extend(points(event["metrics"], event["time"], event["step"]))

    def _finished(self, event: dict[str, Any]) -> None:
        self._flush(event["node"])
        run = self.executions.pop(event["node"], None)
        if run is not None:
            self.to.log_metrics(run, event["metrics"], event["time"])
            self.to.log_tags(run, {"llmpress.key": event["key"], "llmpress.path": event["path"]})
            self._log_manifest(run, event)
            self.to.end(run, "FINISHED", event.get("seconds", event["metrics"]["seconds"]))
        self._child(event, "ran", run)

    def _hit(self, event: dict[str, Any]) -> None:
        found = self.to.find(self.to.stages, {"llmpress.key": event["key"]}, " and attributes.status = 'FINISHED'")
        self._child(event, "hit", found.info.run_id if found else None)

    def _failed(self, event: dict[str, Any]) -> None:
        self._flush(event["node"])
        run = self.executions.pop(event["node"], None)
        if run is not None:
            self.to.log_tags(run, {"llmpress.reason": event["reason"], "llmpress.log": event.get("log", "")})
            self.to.client.set_terminated(run, "FAILED", milliseconds(event["time"]))
        self._child({**event, "metrics": {}}, "failed", run)

    def _end(self, event: dict[str, Any]) -> None:
        report = event["report"]
        self._stop("failed" if report["verdict"] == "failed" else "interrupted")
        self.to.log_metrics(self.pipeline, report["metrics"], self.last)
        self.to.log_tags(self.pipeline, {"mlflow.note.content": event["note"]})
        self._close(report["verdict"], report["seconds"])
        recorded = Recorded(experiment_id=self.to.pipelines, run_id=self.pipeline, state=event["state"])
        recorded.write(Path(self.header["run_dir"]))
        self.ended = True

    def abandon(self) -> None:
        """The run died without a report: what was running was killed."""
        self._stop("interrupted")
        self._close("interrupted", self.last - self.started)

    def _stop(self, status: str) -> None:
        """Close what was still running: a stage that is stopped from outside sends no event of its own."""
        for node in list(self.executions):
            self._flush(node)
            run = self.executions.pop(node)
            self.to.client.set_terminated(run, STAGE_STATUS[status], milliseconds(self.last))
            self._child({"node": node, "time": self.last, "key": self.header["nodes"][node]["key"], "metrics": {}}, status, run)

    def _flush(self, node: str) -> None:
        if node in self.curves:
            self.to.log_points(self.executions[node], self.curves.pop(node))

    def _child(self, event: dict[str, Any], status: str, execution: str | None) -> None:
        """The light run of a stage under its pipeline."""
        node = self.header["nodes"][event["node"]]
        name, _, suffix = event["node"].partition("@")
        label = f"{name} (source model)" if suffix == "source" else event["node"]
        label = f"{node['number']} {label}" if node["number"] else label
        run = self.to.run(self.to.pipelines, {"mlflow.parentRunId": self.pipeline, "llmpress.node": event["node"]}, label, event["time"])
        tags = {"llmpress.kind": "stage", "llmpress.status": status, "llmpress.stage": node["stage"]}
        tags |= {f"llmpress.{field}": event[field] for field in ("key", "path", "reason") if event.get(field)}
        if execution:
            link = f"#/experiments/{self.to.stages}/runs/{execution}"
            note = f"Curves, planned and measured values are with the execution: [{node['short']}]({link})"
            tags |= {"stage_run_id": execution, "mlflow.note.content": note}
        self.to.log_metrics(run, event["metrics"], event["time"])
        self.to.log_tags(run, tags)
        self._log_manifest(run, event)
        self.to.end(run, STAGE_STATUS[status], event["metrics"].get("seconds", 0.0))

    def _log_manifest(self, run: str, event: dict[str, Any]) -> None:
        """Checkpoints are logged by reference: path, key, and the manifest with every file's sha256."""
        manifest = Path(event.get("path", "")) / MANIFEST
        if manifest.is_file():  # a replay may come after the artifact was removed
            self.to.client.log_artifact(run, str(manifest))

    def _close(self, verdict: str, seconds: float) -> None:
        run_dir = Path(self.header["run_dir"])
        for document in sorted(file for pattern in DOCUMENTS for file in run_dir.glob(pattern)):
            self.to.client.log_artifact(self.pipeline, str(document))
        self.to.client.log_dict(self.pipeline, environment(), "environment.json")
        self.to.log_tags(self.pipeline, {"llmpress.verdict": verdict})
        self.to.end(self.pipeline, STATUS[verdict], seconds)
        if self.sweep:
            self.to.end_sweep(self.sweep, self.last)


def record(to: Destination, run_dir: Path, place: Mapping[str, str], *, wait: bool) -> None:
    """Every spool of a run's folder that is meant for `place`, oldest first, one that is still being written until it ends.

    Two runs of one recipe share the folder: with `wait` its turn is awaited, without it left to whoever is at it.
    """
    try:
        with FileLock(run_dir / FOLDER / "recorder.lock", timeout=-1 if wait else 0):
            while waiting := spools(run_dir, place):
                record_spool(to, waiting[0])
    except Timeout:
        print(f"{run_dir}: another process is recording it")


def record_spool(to: Destination, spool: Path) -> None:
    """One attempt, to its end; then the spool is gone."""
    attempt = None
    for events in follow(spool):
        attempt = attempt or Attempt(to, spool.stem, events[0])
        attempt.take(events)
    if attempt is not None and not attempt.ended:
        attempt.abandon()
    spool.unlink()


def record_sweep(to: Destination, folder: Path) -> None:
    """The parent run of a sweep: its ranking as the run's description, its report as artifacts."""
    content = SweepEntry.read(folder)
    run = to.open_sweep(str(folder), content.time)
    to.client.update_run(run, name=content.name)
    to.log_metrics(run, content.metrics, content.time)
    to.log_tags(run, {"llmpress.recipe": content.recipe, "llmpress.command": content.command, "mlflow.note.content": content.note})
    for name in content.artifacts:
        to.client.log_artifact(run, str(folder / name))
    to.show_sweep(run, content.view)
    to.client.set_terminated(run, "FINISHED" if content.exit_code == 0 else "FAILED", milliseconds(content.time))
    Recorded(experiment_id=to.pipelines, run_id=run, state=content.state).write(folder)


def environment() -> dict[str, Any]:
    packages = {package.metadata["Name"]: package.version for package in distributions()}
    return {"python": sys.version, "platform": platform.platform(), "packages": dict(sorted(packages.items()))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the spools of run folders to MLflow at $MLFLOW_TRACKING_URI.")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--artifacts", type=Path, help="where artifacts go; the server's own choice without it")
    parser.add_argument("--sweep", type=Path, help="the folder of a sweep whose report is to be recorded, instead of runs")
    parser.add_argument("run_dirs", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    uri = os.environ["MLFLOW_TRACKING_URI"]
    destination, here = Destination(uri, options.experiment, options.artifacts), place_of(uri, options.experiment)
    if options.sweep:
        record_sweep(destination, options.sweep)
    for number, run_dir in enumerate(options.run_dirs):
        record(destination, run_dir, here, wait=number == 0)  # the first is that of the run that asks


if __name__ == "__main__":
    os.nice(5)  # the stages come first
    main()
