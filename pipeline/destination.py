"""Where runs are recorded: an MLflow server or database, opened safely and written in batches."""

import base64
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType

from pipeline.tracking_uri import RESULTS_VIEW, SQLITE, place_of

MAX_PARAMS, MAX_METRICS, MAX_TAGS, MAX_VALUE = 100, 1000, 100, 6000  # of one batch; characters of a parameter

KIND = {"mlflow.experimentKind": "custom_model_development"}  # not GenAI, which MLflow's user interface takes for granted
COLUMNS = ("perplexity", "perplexity_change_pct", "kl_divergence", "nbytes", "bits_per_weight", "compression_ratio", "seconds")


class Destination:
    """An MLflow server or database and the two experiments there."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None) -> None:
        self.lock = FileLock(lock_file(uri))
        # MLflow's migration of a new sqlite file is not safe for two processes at once and leaves the file broken for good.
        with self.lock:
            self.client = MlflowClient(tracking_uri=uri)
            self.pipelines = self._experiment(experiment, artifacts, KIND | shared_view(RESULTS_VIEW))
            self.stages = self._experiment(f"{experiment}-stages", artifacts, KIND)

    def _experiment(self, name: str, artifacts: Path | None, tags: dict[str, str]) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = (artifacts / name).as_uri() if artifacts else None
        return str(self.client.create_experiment(name, location, tags))

    def find(self, experiment: str, identity: Mapping[str, str], extra: str = "") -> Any | None:
        """The newest run that has these tags, as mlflow.entities.Run."""
        condition = " and ".join(f"tags.`{tag}` = {quoted(value)}" for tag, value in identity.items()) + extra
        runs = self.client.search_runs([experiment], condition, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time DESC"])
        return runs[0] if runs else None

    def run(self, experiment: str, identity: Mapping[str, str], name: str, started: float) -> str:
        """The id of the run with this identity, RUNNING; made where there is none."""
        found = self.find(experiment, identity)
        if found is None:
            tags = {**identity, "mlflow.source.name": "llmpress", "mlflow.source.type": "LOCAL"}
            return str(self.client.create_run(experiment, milliseconds(started), tags, name).info.run_id)
        self.client.update_run(found.info.run_id, status="RUNNING")
        return str(found.info.run_id)

    def open_sweep(self, sweep: str, started: float) -> str:
        """The parent run of a sweep's pipelines, made by whichever of its jobs comes first."""
        with self.lock:
            return self.run(self.pipelines, {"llmpress.kind": "sweep", "llmpress.sweep": sweep}, "sweep", started)

    def end_sweep(self, run: str, time: float) -> None:
        """Called by each pipeline under it: nobody knows which is the last, and the next one opens it again."""
        info = self.client.get_run(run).info
        self.client.set_terminated(run, "FINISHED", max(milliseconds(time), info.start_time, info.end_time or 0))

    def show_sweep(self, run: str, view: str) -> None:
        """A shared view of its pipelines alone, the best perplexity first."""
        columns = [f"metrics.`{name}`" for name in ("nbytes", "perplexity", "perplexity_change_pct", "kl_divergence")] + ["params.`order`"]
        children = f"tags.`mlflow.parentRunId` = '{run}'"
        state = shared_view(view, searchFilter=children, orderByKey="metrics.`perplexity`", orderByAsc=True, selectedColumns=columns)
        for key, value in state.items():
            self.client.set_experiment_tag(self.pipelines, key, value)

    def log_metrics(self, run: str, metrics: Mapping[str, float], time: float) -> None:
        self.log_points(run, points(metrics, time, step=0))

    def log_points(self, run: str, found: Iterable[Metric]) -> None:
        for chunk in batches(found, MAX_METRICS):
            self.client.log_batch(run, metrics=chunk)

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        for chunk in batches([Param(legal(name), parameter(value)) for name, value in params.items()], MAX_PARAMS):
            self.client.log_batch(run, params=chunk)

    def log_tags(self, run: str, tags: Mapping[str, Any]) -> None:
        for chunk in batches([RunTag(name, str(value)) for name, value in tags.items()], MAX_TAGS):
            self.client.log_batch(run, tags=chunk)

    def end(self, run: str, status: str, seconds: float) -> None:
        """Close a run so that its duration is `seconds`: one continued a day later did not take a day."""
        started = self.client.get_run(run).info.start_time
        self.client.set_terminated(run, status, started + milliseconds(seconds))


def lock_file(uri: str) -> str:
    """Beside a database; for a server in the temporary folder, which guards against other processes of this user and machine."""
    if uri.startswith(SQLITE):
        return f"{uri.removeprefix(SQLITE)}.lock"
    return str(Path(tempfile.gettempdir()) / f"llmpress-{os.getuid()}-{place_of(uri, '')['uri_digest'][:16]}.lock")


def shared_view(name: str, **chosen: Any) -> dict[str, str]:
    """A shared view of the runs table, as its "Share" button stores it: by default the table shows no metrics at all."""
    columns = ["attributes.`Duration`", *(f"metrics.`{name}`" for name in COLUMNS), "params.`order`"]
    state = {"orderByKey": "attributes.start_time", "orderByAsc": False, "selectedColumns": columns, "runsExpanded": {}}
    state |= {"searchFilter": "", "runsPinned": [], "runsHidden": [], "viewMaximized": True, "runListHidden": False, **chosen}
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return {f"mlflow.sharedViewState.{name}": f"deflate;{packed}"}


def quoted(value: str) -> str:
    """A value in MLflow's search language, which has two kinds of quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def legal(name: str) -> str:
    """MLflow takes letters, digits and _ - . : / and space in names; lm-eval's `acc,none` becomes `acc_none`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def parameter(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE else f"({len(text)} characters: see the recipe among the artifacts)"


def points(metrics: Mapping[str, float], time: float, step: int) -> list[Metric]:
    return [Metric(legal(name), value, milliseconds(time), step) for name, value in metrics.items()]


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
