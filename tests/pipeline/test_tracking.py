"""MLflow through spools: recorded once, beside the run, and never at its cost. The recorder and the database are real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline import recorder
from pipeline.destination import Destination, legal, parameter
from pipeline.plan import Plan
from pipeline.recipe import TrackingSettings
from pipeline.report import Report, build_report
from pipeline.run_record import RunRecord
from pipeline.spool import FOLDER, Recorded, Spool, follow, is_live, spools
from pipeline.tracking import RECORDER_ENVIRONMENT, Tracker, short_name, short_stage
from pipeline.tracking_uri import is_recorded, place_of, view_command
from stages.gptq import GPTQ
from stages.rtn import RTN
from tests.pipeline.rehearsal import plan_of, rehearse, small_model

LONG = 300.0  # seconds for a recorder on a loaded machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RECORDER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> None:
    """A database whose tables exist: making them takes MLflow seconds."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")


class Unrecorded(Tracker):
    """A tracker whose recorder dies at once, so that its spool stays."""

    def _launch(self, run_dirs: list[Path]) -> "subprocess.Popen[bytes]":
        self.log.write_text("killed\n")
        return subprocess.Popen(["true"])


def folder_of(plan: Plan, outputs: Path) -> Path:
    folder = outputs / "runs" / "rehearsed" / plan.digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(plan: Plan, outputs: Path, kind: type[Tracker] = Tracker, uri: str | None = None, error: BaseException | None = None,
        sweep: str = "", **events: Any) -> tuple[Tracker, str, Report]:  # fmt: skip
    folder = folder_of(plan, outputs)
    record, tracker = RunRecord(folder), kind(plan, TrackingSettings(uri=uri), outputs, folder, sweep)
    rehearse(plan, outputs, [record, tracker], **events)
    report = build_report(plan, record, error)
    report.write(folder)
    return tracker, tracker.finish(report, patience=LONG), report


def replay(outputs: Path, *folders: Path) -> MlflowClient:
    """What a recorder does, in this process."""
    uri = f"sqlite:///{outputs / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        recorder.main(["--experiment", "llmpress", "--artifacts", str(outputs / "mlartifacts"), *map(str, folders)])
    return MlflowClient(tracking_uri=uri)


def found(client: MlflowClient, experiment: str = "llmpress", condition: str = "") -> list[Run]:
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return list(client.search_runs([experiment_id], condition, order_by=["attributes.start_time ASC"]))


def statuses(client: MlflowClient) -> dict[str, str]:
    """The status of every execution by its name: stages that start in one millisecond have no order."""
    return {run.info.run_name: run.info.status for run in found(client, "llmpress-stages")}


def pipelines(client: MlflowClient) -> list[Run]:
    return found(client, condition="tags.`llmpress.kind` = 'pipeline'")


def test_a_run_is_recorded_and_the_same_run_again_starts_nothing(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    started = time.monotonic()
    tracker, line, report = run(plan, tmp_path)
    recording = time.monotonic() - started
    command, address = line.splitlines()
    assert command == f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}"
    assert address.startswith("http://127.0.0.1:5000/#/experiments/1/runs?")
    assert tracker._recorder is not None
    assert spools(tracker.run_dir) == []
    client = MlflowClient(tracking_uri=tracker.uri)
    (pipeline,) = pipelines(client)
    assert (pipeline.info.run_name, pipeline.info.status) == ("prune>rtn4g64", "FINISHED")
    assert pipeline.data.metrics == pytest.approx(report.metrics)

    started = time.monotonic()
    tracker, line, _ = run(plan, tmp_path)
    assert line.splitlines()[0].endswith("(already recorded)")
    assert tracker._recorder is None
    assert time.monotonic() - started < 0.3 * recording, "which imports MLflow, in another process"

    client.delete_run(pipeline.info.run_id)
    assert not is_recorded(tracker.run_dir, tracker.uri, Recorded.read(tracker.run_dir).state)  # type: ignore[union-attr]


@pytest.mark.usefixtures("database")
def test_a_database_elsewhere_leaves_nothing_in_the_working_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    tracker, line, _ = run(plan_of(model, tmp_path / "outputs"), tmp_path / "outputs", uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert line.startswith("mlflow ui"), line
    assert list(here.iterdir()) == []
    assert not is_live(tracker.run_dir / FOLDER / "gone.jsonl")


def test_the_main_process_never_imports_mlflow() -> None:
    code = (
        "import sys, pipeline.tracking, pipeline.report_table; sys.exit(any(m in sys.modules for m in ('mlflow', 'torch', 'sqlalchemy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_four_runs_at_once_share_a_new_database(model: Path, tmp_path: Path) -> None:
    folders = []
    for num_bits in (2, 3, 4, 8):
        plan = plan_of(model, tmp_path, num_bits=num_bits)
        run(plan, tmp_path, Unrecorded)
        folders.append(folder_of(plan, tmp_path))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "pipeline.recorder", "--experiment", "llmpress", "--artifacts", str(tmp_path / "mlartifacts")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    recorders = [subprocess.Popen([*command, str(folder)], env=environment, stderr=subprocess.PIPE) for folder in folders]
    for process in recorders:
        _, errors = process.communicate(timeout=LONG)
        assert process.returncode == 0, errors.decode()
    names = [run.info.run_name for run in pipelines(MlflowClient(tracking_uri=uri))]
    assert sorted(names) == [f"prune>rtn{num_bits}g64" for num_bits in (2, 3, 4, 8)]


@pytest.mark.usefixtures("database")
def test_a_tracker_that_is_down_costs_a_sentence_and_only_a_run_for_the_same_place_replays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plan = plan_of(model, tmp_path)
    tracker, line, report = run(plan, tmp_path, uri="http://127.0.0.1:9")
    assert line.startswith("not recorded, to be tried again by the next run: API request to http://127.0.0.1:9")
    assert "\n" not in line
    assert (report.verdict, len(spools(tracker.run_dir))) == ("complete", 1)

    other = Tracker(plan_of(model, tmp_path, num_bits=3), TrackingSettings(), tmp_path, tmp_path / "runs" / "other" / "0")
    assert other._forgotten() == []
    same = TrackingSettings(uri="http://127.0.0.1:9")
    assert Tracker(other.plan, same, tmp_path, other.run_dir)._forgotten() == [tracker.run_dir]
    elsewhere = TrackingSettings(uri="http://127.0.0.1:9", experiment="another")
    assert Tracker(other.plan, elsewhere, tmp_path, other.run_dir)._forgotten() == []

    run(plan, tmp_path, Unrecorded)  # the same recipe for the default database: two spools in one folder
    assert other._forgotten() == [tracker.run_dir]
    assert [run.info.run_name for run in pipelines(replay(tmp_path, tracker.run_dir))] == ["prune>rtn4g64"]
    (left,) = spools(tracker.run_dir)
    assert json.loads(left.read_text().splitlines()[0])["place"] == tracker.place


def test_a_place_is_without_its_password_and_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of("http://me:secret@tracking:5000", "e") == place_of("http://me:changed@tracking:5000", "e")
    monkeypatch.chdir(tmp_path)
    assert place_of("sqlite:///mlflow.db", "e") == place_of(f"sqlite:///{tmp_path}/mlflow.db", "e")
    assert place_of("sqlite:///mlflow.db", "e") != place_of("sqlite:///other.db", "e")


@pytest.mark.usefixtures("database")
def test_a_killed_run_is_recorded_as_killed_by_the_recorder_it_left_behind(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
from pipeline.recipe import TrackingSettings
from pipeline.tracking import Tracker
from tests.pipeline.rehearsal import plan_of, rehearse
outputs = Path({str(tmp_path)!r})
plan = plan_of(Path({str(model)!r}), outputs)
tracker = Tracker(plan, TrackingSettings(), outputs, Path({str(folder)!r}))
rehearse(plan, outputs, [tracker], stop="quantize")
print(tracker._recorder.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    deadline = time.monotonic() + LONG
    while spools(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert spools(folder) == []
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (pipeline,) = pipelines(client)
    assert (pipeline.info.status, pipeline.data.tags["llmpress.verdict"]) == ("KILLED", "interrupted")
    finished = {"hidden_states": "FINISHED", "evaluate": "FINISHED", "prune": "FINISHED"}
    assert statuses(client) == {**finished, "rtn4g64": "KILLED"}
    assert Recorded.read(folder) is None  # so the next run is recorded whatever it finds


@pytest.mark.usefixtures("database")
def test_a_stage_stopped_by_ctrl_c_does_not_stay_running(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    run(plan, tmp_path, Unrecorded, error=KeyboardInterrupt(), stop="quantize")
    client = replay(tmp_path, folder_of(plan, tmp_path))
    (pipeline,) = pipelines(client)
    assert (pipeline.info.status, pipeline.data.tags["llmpress.verdict"]) == ("KILLED", "interrupted")
    finished = {"hidden_states": "FINISHED", "evaluate": "FINISHED", "prune": "FINISHED"}
    assert statuses(client) == {**finished, "rtn4g64": "KILLED"}
    (stopped,) = found(client, condition="tags.`llmpress.status` = 'interrupted'")
    assert (stopped.info.run_name, stopped.info.status) == ("3 quantize", "KILLED")
    execution = client.get_run(stopped.data.tags["stage_run_id"])
    assert (execution.info.run_name, execution.info.status) == ("rtn4g64", "KILLED")
    assert len(client.get_metric_history(execution.info.run_id, "loss")) == 3


@pytest.mark.usefixtures("database")
def test_running_again_updates_the_pipeline_and_hits_point_to_the_execution(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    run(plan, tmp_path, Unrecorded, error=RuntimeError("out of memory"), fail="quantize")
    client = replay(tmp_path, folder)
    (pipeline,) = pipelines(client)
    assert pipeline.info.status == "FAILED"
    (failed,) = found(client, condition="tags.`llmpress.status` = 'failed'")
    assert failed.data.tags["llmpress.reason"].startswith("out of memory")

    run(plan, tmp_path, Unrecorded)
    (again,) = pipelines(replay(tmp_path, folder))
    assert (again.info.run_id, again.info.status) == (pipeline.info.run_id, "FINISHED")
    assert (again.data.metrics["stages_hit"], again.data.metrics["stages_ran"]) == (3, 2)
    children = found(client, condition=f"tags.`mlflow.parentRunId` = '{pipeline.info.run_id}'")
    told = {child.info.run_name: child.data.tags["llmpress.status"] for child in children}
    of_source = {"hidden_states (source model)": "hit", "1 evaluate (source model)": "hit"}
    assert told == {**of_source, "2 prune": "hit", "3 quantize": "ran", "4 evaluate": "ran"}
    for child in children:
        execution = client.get_run(child.data.tags["stage_run_id"])
        assert execution.data.tags["llmpress.key"] == child.data.tags["llmpress.key"]
        assert execution.info.status == "FINISHED"
    assert len(found(client, "llmpress-stages")) == 6  # five finished, one failed


@pytest.mark.usefixtures("database")
def test_an_execution_holds_curves_and_planned_beside_measured(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path, target={"name": "host", "flops": 1e8, "bandwidth": 1e8})
    run(plan, tmp_path, Unrecorded)
    client = replay(tmp_path, folder_of(plan, tmp_path))
    (execution,) = found(client, "llmpress-stages", "attributes.run_name = 'rtn4g64'")
    curve = client.get_metric_history(execution.info.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    metrics = execution.data.metrics
    node = next(node for node in plan.nodes if node.name == "quantize")
    assert metrics["planned_nbytes"] == metrics["measured_nbytes"] == metrics["nbytes"]
    assert (metrics["planned_seconds"], metrics["measured_seconds"]) == (node.seconds, 12.5)
    assert (metrics["planned_peak_ram"], metrics["measured_peak_ram"]) == (node.memory.totals["ram"], 250_000_000)
    assert not {"planned_peak_vram", "measured_peak_vram"} & set(metrics), "no GPU is planned and none was used"
    assert {"bits_per_weight", "kv_bytes_per_token"} <= set(metrics)
    (pipeline,) = pipelines(client)
    assert pipeline.data.metrics["planned_seconds"] == pytest.approx(sum(node.seconds or 0 for node in plan.nodes), abs=1e-3)
    assert (execution.data.params["num_bits"], execution.data.params["group_size"]) == ("4", "64")
    assert execution.info.end_time - execution.info.start_time == 12_500


@pytest.mark.usefixtures("database")
def test_a_pipeline_holds_params_and_documents_but_no_weights(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    (folder / "recipe.yaml").write_text("order: [prune]\n")
    run(plan, tmp_path, Unrecorded)
    client = replay(tmp_path, folder)
    (pipeline,) = pipelines(client)
    params = pipeline.data.params
    assert (params["order"], params["prune.mlp_ratio"], params["quantize.stage"]) == ("prune > quantize > evaluate", "0.5", "rtn")
    documents = {file.path for file in client.list_artifacts(pipeline.info.run_id)}
    assert documents == {"recipe.yaml", "report.json", "environment.json"}
    (child,) = found(client, condition="attributes.run_name = '3 quantize'")
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["artifact.json"]
    assert "compression_ratio" in pipeline.data.metrics
    assert "| prune |" in pipeline.data.tags["mlflow.note.content"]


@pytest.mark.usefixtures("database")
def test_a_replay_that_was_cut_short_doubles_nothing(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    run(plan, tmp_path, Unrecorded)
    (spool,) = spools(folder)
    content = spool.read_bytes()
    replay(tmp_path, folder)
    spool.write_bytes(content)  # as if the recorder had died before it deleted the spool
    client = replay(tmp_path, folder)
    assert (len(pipelines(client)), len(found(client)), len(found(client, "llmpress-stages"))) == (1, 6, 5)
    (execution,) = found(client, "llmpress-stages", "attributes.run_name = 'rtn4g64'")
    assert len(client.get_metric_history(execution.info.run_id, "loss")) == 3


@pytest.mark.usefixtures("database")
def test_a_sweep_is_the_parent_of_its_pipelines(model: Path, tmp_path: Path) -> None:
    sweep = str(tmp_path / "a person's sweep")
    first, second = (plan_of(model, tmp_path, num_bits=num_bits) for num_bits in (3, 4))
    run(first, tmp_path, Unrecorded, sweep=sweep)
    run(second, tmp_path, Unrecorded, sweep=sweep, error=KeyboardInterrupt(), stop="quantize")
    client = replay(tmp_path, folder_of(first, tmp_path), folder_of(second, tmp_path))
    (parent,) = found(client, condition="tags.`llmpress.kind` = 'sweep'")
    assert (parent.info.run_name, parent.info.status, parent.data.tags["llmpress.sweep"]) == ("sweep", "FINISHED", sweep)
    children = found(client, condition=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [(child.info.run_name, child.info.status) for child in children] == [
        ("prune>rtn3g64", "FINISHED"),
        ("prune>rtn4g64", "KILLED"),
    ]


@pytest.mark.usefixtures("database")
def test_jobs_of_a_sweep_at_once_make_one_parent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    destinations = [Destination(uri, "llmpress", tmp_path / "mlartifacts") for _ in range(4)]
    start = threading.Barrier(len(destinations))

    def job(destination: Destination) -> str:
        start.wait()
        return destination.open_sweep("sweep", time.time())

    with ThreadPoolExecutor(len(destinations)) as pool:
        assert len(set(pool.map(job, destinations))) == 1


@pytest.mark.usefixtures("database")
def test_batches_are_of_what_mlflow_takes(tmp_path: Path) -> None:
    destination = Destination(f"sqlite:///{tmp_path / 'mlflow.db'}", "llmpress", tmp_path / "mlartifacts")
    run_id = destination.run(destination.stages, {"k": "v"}, "many", time.time())
    destination.log_params(run_id, {f"p{i}": i for i in range(250)})
    destination.log_metrics(run_id, {f"m{i}": float(i) for i in range(1100)}, time.time())
    data = destination.client.get_run(run_id).data
    assert (len(data.params), len(data.metrics)) == (250, 1100)


def test_what_mlflow_would_refuse_is_put_into_its_form() -> None:
    assert legal("acc,none@2") == "acc_none_2"
    assert parameter([1, 2]) == "[1, 2]"
    assert parameter("x" * 6001) == "(6001 characters: see the recipe among the artifacts)"


def test_a_quantizer_s_short_name_says_how_it_was_told_to_round(model: Path, tmp_path: Path) -> None:
    told = plan_of(model, tmp_path, order=["quantize"])
    stage = RTN.from_dict({"num_bits": 3, "observer": "mse"})
    assert short_stage(replace(told.nodes[0], stage=stage)) == "rtn3(mse)"
    assert short_stage(replace(told.nodes[0], stage=GPTQ.from_dict({"backend": "auto_gptq"}))) == "gptq4(auto_gptq)"


def test_conversions_are_in_the_short_name(model: Path, tmp_path: Path) -> None:
    assert short_name(plan_of(model, tmp_path, order=["quantize", "prune", "evaluate"])) == "rtn4g64>dequantize>prune"


def test_the_view_is_as_short_as_the_working_folder_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert view_command(None, tmp_path / "outputs") == "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"
    assert view_command("http://me:secret@tracking:5000", tmp_path) == "http://***@tracking:5000"


def test_a_spool_is_live_while_its_writer_is_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, {"event": "pipeline"})
    assert is_live(spool.path)
    spool.append({"event": "curve"})
    spool._stream.write('{"event": "cu')
    spool.close()
    assert not is_live(spool.path)
    assert [event["event"] for batch in follow(spool.path) for event in batch] == ["pipeline", "curve"]


def test_a_spool_that_lost_its_header_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "1-1.jsonl").touch()
    assert len(spools(tmp_path)) == 1
    assert spools(tmp_path, place_of("sqlite:///mlflow.db", "llmpress")) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    (folder / FOLDER).write_text("a file in the way")
    _, line, report = run(plan, tmp_path)
    assert line.startswith("not recorded: events cannot be spooled")
    assert report.verdict == "complete"
    assert json.loads((folder / "report.json").read_text())["verdict"] == "complete"


def test_a_disk_that_is_full_at_the_end_is_a_sentence(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    record, tracker = RunRecord(folder), Unrecorded(plan, TrackingSettings(), tmp_path, folder)
    rehearse(plan, tmp_path, [record, tracker])
    assert tracker._spool is not None
    tracker._spool._stream.close()
    tracker._spool._stream = open("/dev/full", "a")  # noqa: SIM115  closed by `finish`
    assert tracker.finish(build_report(plan, record)) == "not recorded: [Errno 28] No space left on device"
    assert tracker._spool._stream.closed


def test_a_disk_that_is_full_on_the_way_is_a_sentence(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path)
    folder = folder_of(plan, tmp_path)
    record, tracker = RunRecord(folder), Unrecorded(plan, TrackingSettings(), tmp_path, folder)

    def fill(event: Mapping[str, Any]) -> None:
        if event["event"] == "curve" and tracker._spool is not None and tracker._spool._stream.name != "/dev/full":
            tracker._spool._stream.close()
            tracker._spool._stream = open("/dev/full", "a")  # noqa: SIM115  closed by `finish`

    rehearse(plan, tmp_path, [record, fill, tracker])
    assert tracker.finish(build_report(plan, record)) == "not recorded: events cannot be spooled ([Errno 28] No space left on device)"


def test_a_spool_without_room_for_its_header_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Spool, event: Mapping[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "append", no_room)
    with pytest.raises(OSError, match="No space left"):
        Spool(tmp_path, {"event": "pipeline"})
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_the_recorder_is_of_the_package_that_starts_it(tmp_path: Path) -> None:
    for package in ("pipeline", "stages"):
        shutil.copytree(package, tmp_path / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import sys
from pathlib import Path
from pipeline.tracking import _popen
with open("log", "wb") as log:
    _popen([sys.executable, "-P", "-c", "import pipeline; print(pipeline.__file__)"], "", log).wait()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "copy", env=environment, check=True)
    assert (tmp_path / "copy" / "log").read_text().strip() == str(tmp_path / "copy" / "pipeline" / "__init__.py")
