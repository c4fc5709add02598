"""MLflow, off the critical path: what a run does about tracking in its own process, which never imports mlflow.

`Tracker` listens and writes a spool (see `spool.py`). The moment a stage really runs it starts `python -m pipeline.recorder`,
which follows the spool and writes to MLflow beside the run. A tracking server that is down, a wrong address or a killed run
costs one sentence, never the run: the spool stays, and the next run that records to the same place hands it to its recorder.
Where every stage was a hit and MLflow has this very pipeline already, nothing is started at all.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.artifact import DERIVED, MEASUREMENTS, Manifest
from pipeline.identity import digest, non_default
from pipeline.installed import package_path
from pipeline.plan import Plan, PlannedNode
from pipeline.recipe import ModelSource, TrackingSettings
from pipeline.report import Report, artifact_bytes, model_facts
from pipeline.report_table import markdown
from pipeline.spec import ModelSpec
from pipeline.spool import FOLDER, Recorded, Spool, is_live, spools
from pipeline.tracking_uri import chosen_uri, default_uri, is_recorded, place_of, where, without_password

REASON_WIDTH = 160  # characters of an error that are shown
PATIENCE = 20.0  # seconds that a finished run waits for its recorder
PATIENCE_AFTER_INTERRUPT = 2.0  # Ctrl-C means now; the recorder goes on by itself
HEAVY_EVENTS = ("node_started", "node_finished", "node_failed", "curve")  # something ran, so there is something to record
IGNORED_EVENTS = ("progress",)
RECORDER_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class Tracker:
    """A listener for one run; call `finish` when its report is written. `outputs` holds the default database and `runs/`.

    `sweep` is an id that all jobs of a sweep share, its folder's path; their pipelines then stand under one parent run.
    """

    def __init__(self, plan: Plan, settings: TrackingSettings, outputs: Path, run_dir: Path, sweep: str = "") -> None:
        self.plan, self.settings, self.outputs, self.run_dir = plan, settings, outputs, run_dir
        self.chosen = chosen_uri(settings)
        self.uri = self.chosen or default_uri(outputs)
        self.place = place_of(self.uri, settings.experiment)
        self.sweep = sweep
        self.log = run_dir / FOLDER / "recorder.log"
        self._waiting: list[Mapping[str, Any]] = []
        self._spool: Spool | None = None
        self._recorder: subprocess.Popen[bytes] | None = None
        self._problem = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Never raises for its own troubles: `finish` tells them."""
        if event["event"] in IGNORED_EVENTS or self._problem:
            return
        try:
            if event["event"] in ("node_hit", "node_finished"):
                event = {**event, "metrics": measurements(Manifest.load(Path(event["path"])))}
            self._waiting.append(event)
            if self._spool is None and event["event"] in HEAVY_EVENTS:
                self._start()
            self._write()
        except (OSError, ValueError) as error:
            self._problem = f"events cannot be spooled ({without_password(str(error))})"

    def finish(self, report: Report, patience: float = PATIENCE) -> str:
        """Hand over the report and wait for the recorder, at most `patience` seconds. Returns where to look, or what is wrong."""
        try:
            return self._hand_over(report) or self._wait(patience, report.verdict)
        except OSError as error:
            return f"not recorded: {self._problem or without_password(str(error))}"

    def _hand_over(self, report: Report) -> str:
        """Write the report and close the spool. What to say where nobody is to be waited for, else empty."""
        state = self._state(report)
        nothing_ran = self._spool is None and not self._problem
        if nothing_ran and report.verdict == "complete" and is_recorded(self.run_dir, self.uri, state):
            self._replay()
            return self._where("   (already recorded)")
        try:
            if nothing_ran:
                self._start()
            if not self._problem:
                end = {"event": "end", "report": report.model_dump(mode="json"), "note": markdown(report), "state": state}
                self._waiting.append(end)
                self._write()
        finally:
            if self._spool is not None:
                self._spool.close()
        return f"not recorded: {self._problem}" if self._problem else ""

    def _wait(self, patience: float, verdict: str) -> str:
        assert self._spool is not None and self._recorder is not None, "both were started when the report was handed over"
        deadline = time.monotonic() + (patience if verdict != "interrupted" else min(patience, PATIENCE_AFTER_INTERRUPT))
        while self._spool.path.exists() and self._recorder.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._spool.path.exists():
            return self._where()
        if self._recorder.poll() is None:
            return self._where(f"   (still writing, log {self.log})")
        return f"not recorded, to be tried again by the next run: {last_words(self.log)} (log {self.log})"

    def _where(self, remark: str = "") -> str:
        return where(self.chosen, self.outputs, Recorded.read(self.run_dir), remark)

    def _start(self) -> None:
        self._spool = Spool(self.run_dir, header(self.plan, self.run_dir, self.place, self.sweep))
        self._recorder = self._launch([self.run_dir, *self._forgotten()])

    def _write(self) -> None:
        if self._spool is not None:
            for event in self._waiting:
                self._spool.append(event)
            self._waiting.clear()

    def _replay(self) -> None:
        """Let what earlier runs could not record be recorded now; nobody waits for it."""
        forgotten = self._forgotten() + ([self.run_dir] if spools(self.run_dir, self.place) else [])
        if forgotten:
            self._launch(forgotten)

    def _forgotten(self) -> list[Path]:
        """Folders of other runs with spools for this very place, which nobody writes any more."""
        folders = sorted({spool.parent.parent for spool in self.outputs.glob(f"runs/*/*/{FOLDER}/*.jsonl")} - {self.run_dir})
        return [folder for folder in folders if spools(folder, self.place) and not any(is_live(spool) for spool in spools(folder))]

    def _launch(self, run_dirs: list[Path]) -> "subprocess.Popen[bytes]":
        return start_recorder(self.uri, self.settings.experiment, self.outputs, self.log, list(map(str, run_dirs)))

    def _state(self, report: Report) -> str:
        """Digest of what MLflow would hold of this run when every stage is a hit, and of where."""
        keys = {stage.name: stage.key for stage in report.stages if stage.type not in DERIVED}
        return digest("tracking", {"digest": report.digest, "keys": keys, "place": self.place, "sweep": self.sweep})


def start_recorder(uri: str, experiment: str, outputs: Path, log: Path, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A session of its own keeps the terminal's Ctrl-C away; -P keeps the working folder's modules out. What it prints goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "pipeline.recorder", "--experiment", experiment]
    if not uri.startswith("http"):  # a server has its own place; without one MLflow would make ./mlruns
        command += ["--artifacts", str((outputs / "mlartifacts").resolve())]
    with open(log, "wb") as stream:
        return _popen([*command, *arguments], uri, stream)


def _popen(command: list[str], uri: str, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """With this very package, wherever it was imported from, as the stages' processes.

    The URI goes through the environment: it may hold a password, and command lines are public.
    """
    environment = {**RECORDER_ENVIRONMENT, **os.environ, **package_path(), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def header(plan: Plan, run_dir: Path, place: Mapping[str, str], sweep: str) -> dict[str, Any]:
    """The spool's first line: everything about the pipeline that is known before it runs."""
    numbers = {node.name: number for number, node in enumerate((node for node in plan.nodes if not node.is_derived), 1)}
    return {
        "event": "pipeline",
        "time": time.time(),
        "name": short_name(plan),
        "recipe": plan.recipe.name,
        "digest": plan.digest,
        "place": dict(place),
        "sweep": sweep,
        "run_dir": str(run_dir.resolve()),
        "params": pipeline_params(plan),
        "nodes": {node.name: _node_header(node, numbers.get(node.name)) for node in plan.nodes},
    }


def _node_header(node: PlannedNode, number: int | None) -> dict[str, Any]:
    """What is derived has no number: it is not in every plan of the same recipe."""
    planned = {f"planned_peak_{place}": float(count) for place, count in node.memory.totals.items() if count}
    specs = [spec for spec in node.expected.values() if isinstance(spec, ModelSpec)]
    if specs:
        planned["planned_nbytes"] = float(sum(spec.nbytes for spec in specs))
    if node.seconds is not None:
        planned["planned_seconds"] = node.seconds
    return {
        "number": number,
        "stage": node.stage.name,
        "version": node.stage.version,
        "short": short_stage(node),
        "key": node.key,
        "params": node.stage.params.model_dump(mode="json"),
        "planned": planned,
    }


def pipeline_params(plan: Plan) -> dict[str, Any]:
    """`order`, `model` and each stage's parameters as `prune.head_ratio`, defaults included: what a person compares runs by."""
    params: dict[str, Any] = {"order": " > ".join(plan.recipe.order), "model": _model_name(plan.recipe.model)}
    for node in plan.nodes:
        name, _, suffix = node.name.partition("@")
        if suffix != "source" and not node.is_derived:
            params |= {f"{name}.stage": node.stage.name}
            params |= {f"{name}.{field}": value for field, value in node.stage.params.model_dump(mode="json").items()}
    return params


def _model_name(model: ModelSource) -> str:
    return model.path or (f"{model.id}@{model.revision}" if model.id else "architecture")


def short_name(plan: Plan) -> str:
    """`prune>distill>gptq4`: what was done to the model, in order, inserted conversions included; measurements alone if nothing was."""
    made = [node for node in plan.nodes if not all(issubclass(kind, MEASUREMENTS) for kind in node.types.values())]
    return ">".join(map(short_stage, made or plan.nodes))


def short_stage(node: PlannedNode) -> str:
    """A quantizing stage by its method, width (`gptq4.5`: a budget, of scales too), unusual group size and what else it was told
    (`gptq4g64`, `gptq4(auto_gptq)`, `rtn4(mse)`), any other by the recipe's own name for it."""
    num_bits = getattr(node.stage.params, "num_bits", None)
    if mixed := getattr(node.stage.params, "mixed_precision", None):
        num_bits = f"{mixed.budget_bits:g}"
    if num_bits is None:
        return node.name.partition("@")[0]
    chosen = non_default(node.stage.params)
    told = [chosen[name] for name in ("backend", "observer") if name in chosen]
    return (
        f"{node.stage.name}{num_bits}"
        + (f"g{chosen['group_size']}" if "group_size" in chosen else "")
        + (f"({', '.join(told)})" if told else "")
    )


def measurements(manifest: Manifest) -> dict[str, float]:
    """An artifact's numbers under the flat names of MLflow. Each known `measured_<name>` answers a `planned_<name>` of `_node_header`."""
    size = model_facts(manifest.spec) if manifest.spec else {"nbytes": float(artifact_bytes(manifest))}
    found = {
        "nbytes": manifest.tensor_bytes,
        "peak_ram": manifest.peak_ram,
        "peak_vram": manifest.peak_vram,
        "seconds": manifest.seconds,
    }
    measured = {f"measured_{name}": float(value) for name, value in found.items() if value is not None}
    return size | {"seconds": manifest.seconds} | measured | manifest.metrics


def last_words(log: Path) -> str:
    """The end of a traceback, short enough for one line."""
    lines = without_password(log.read_text(encoding="utf-8", errors="replace")).strip().splitlines()
    reason = lines[-1].rpartition("Exception: ")[2] if lines else "no output"
    return reason if len(reason) <= REASON_WIDTH else reason[:REASON_WIDTH] + "..."
