"""Sweeps on Hydra's launchers: what jobs share runs once whoever runs them, and whatever ends one leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import toys
from tests.scenarios.conftest import UNTRACKED, Run

PARALLEL = ("-m", "hydra/launcher=parallel", UNTRACKED)
RECIPE = """# Two reports, the second of which takes a second. No job can do without the first.
defaults:
  - /stage@stages.first: toy
  - /stage@stages.report: toy
  - _self_
order: [first, report]
model: {{path: {model}}}
stages:
  report: {{action: slow, witness: {witness}, inputs: {{other: first}}}}
"""
JOBS = 4
SWEEP = ("recipe=toys.yaml", f"stages.report.value={','.join(map(str, range(1, JOBS + 1)))}")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def site(tmp_path: Path, toys_path: str) -> Path:
    """A working folder with a recipe of toys. They need no torch, so none is there to be imported first, which takes seconds."""
    (tmp_path / "no_torch" / "torch").mkdir(parents=True)
    (tmp_path / "no_torch" / "torch" / "__init__.py").write_text("raise ImportError('not for toys', name='torch')")
    toys.write_model(tmp_path / "model")
    (tmp_path / "toys.yaml").write_text(RECIPE.format(model=tmp_path / "model", witness=tmp_path / "witness"))
    return tmp_path


@pytest.fixture
def start(site: Path, toys_path: str) -> Start:
    """`run ARGUMENTS`, in a session of its own as in a terminal."""

    def command(*arguments: str) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=site,
            env={**environment, "PYTHONPATH": os.pathsep.join((str(site / "no_torch"), toys_path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return command


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    _, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    return process.returncode, err


def executions(site: Path) -> list[int]:
    """The process of every execution of `report`, also of those that were killed."""
    witness = site / "witness"
    return [int(line) for line in witness.read_text().split()] if witness.exists() else []


def published(site: Path) -> dict[str, int]:
    """Every artifact with the time of its publication."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (site / "outputs" / "store").glob("*/artifact.json")}


def tree(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(toys.is_alive(process.pid) and process.is_running() for process in processes)


def test_two_workers_execute_what_four_jobs_share_once_and_the_table_has_all_four(run: Run, folder: Path) -> None:
    axes = ("order=[prune,quantize],[quantize]", "stages.quantize.num_bits=8,4")
    outcome = run(*PARALLEL, "recipe=mine.yaml", *axes, "format=json")
    assert outcome.code == 0, outcome.err
    reports = [json.loads(file.read_text()) for file in (folder / "outputs" / "runs" / "mine").glob("*/report.json")]
    ran = [stage["key"][:12] for report in reports for stage in report["stages"] if stage["status"] == "ran"]
    assert len(reports) == 4 and len(ran) == len(set(ran)) == 5, "prune, and quantize in two positions with two numbers of bits"
    assert {name.rpartition("-")[2] for name in published(folder)} == set(ran)
    assert "[0] " in outcome.err and "[1] " in outcome.err, "lines say whose they are"
    jobs = [json.loads(file.read_text()) for file in (folder / "outputs" / "sweeps").glob("*/jobs/*.json")]
    assert sorted(job["exit_code"] for job in jobs) == [0, 0, 0, 0]


def test_a_worker_that_is_killed_costs_no_finished_stage_and_the_same_command_completes(start: Start, site: Path) -> None:
    process = start(*PARALLEL, *SWEEP)
    # `first` and two reports are there, the other two are running.
    toys.wait_until(lambda: len(published(site)) >= 3 and len(executions(site)) == JOBS)
    everyone, stage = tree(process), psutil.Process(executions(site)[-1])
    threads = int(stage.environ()["OMP_NUM_THREADS"])
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2), "the stages of two jobs share the cores"
    worker = next(parent for parent in stage.parents() if parent.ppid() == process.pid)
    worker.kill()
    code, err = end_of(process)
    assert code not in (0, 130) and "the same command runs what is missing" in err
    toys.wait_until(lambda: are_gone(everyone))
    before = published(site)
    assert 3 <= len(before) <= JOBS

    code, err = end_of(start(*PARALLEL, *SWEEP))
    assert code == 0, err
    after = published(site)
    assert len(after) == 1 + JOBS and before.items() <= after.items(), "what had finished is as it was"
    assert len(executions(site)) == JOBS + len(after) - len(before)


@pytest.mark.parametrize("everyone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_of_a_parallel_sweep_and_a_later_one_completes(start: Start, site: Path, everyone: bool) -> None:
    process = start(*PARALLEL, *SWEEP)
    toys.wait_until(lambda: len(executions(site)) >= 2)
    processes = tree(process)
    assert len(processes) > 4
    if everyone:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    else:
        process.send_signal(signal.SIGINT)
    code, err = end_of(process)
    assert code == 130 and "interrupted" in err
    toys.wait_until(lambda: are_gone(processes))
    before = published(site)
    assert sorted(path.name for path in (site / "outputs" / "store").iterdir()) == sorted(before), "nothing is half-written"
    if not everyone:
        return

    code, err = end_of(start(*PARALLEL, *SWEEP))
    assert code == 0, err
    assert len(published(site)) == 1 + JOBS and before.items() <= published(site).items()
    assert not os.listdir(site / "outputs" / "scratch")


def test_no_worker_outlives_a_sweep_that_is_killed(start: Start, site: Path) -> None:
    process = start(*PARALLEL, *SWEEP)
    toys.wait_until(lambda: len(executions(site)) >= 2)
    processes = tree(process)
    process.kill()
    process.communicate()
    toys.wait_until(lambda: are_gone(processes))


def test_jobs_that_slurm_would_start_take_their_settings_and_folders_along(start: Start, site: Path) -> None:
    code, err = end_of(start("-m", "hydra/launcher=slurm_local", "recipe=toys.yaml", "stages.report.value=1,2", UNTRACKED))
    assert code == 0, err
    assert len(executions(site)) == 2 and len(published(site)) == 3
    (sweep,) = (site / "outputs" / "sweeps").iterdir()
    logs = [log.read_text() for log in sweep.glob(".submitit/*/*_log.out")]
    assert len(logs) == 2 and all("report: done in" in log for log in logs)


@pytest.mark.extras
def test_jobs_run_on_a_ray_cluster(start: Start, site: Path, toys_path: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher.ray_launcher")
    port, ray = 6399, Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(site / "no_torch"), toys_path))},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert head.stdout and any("Ray runtime started" in line for line in head.stdout)
        cluster = ("-m", "hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address=127.0.0.1:{port}", UNTRACKED)
        code, err = end_of(start(*cluster, *SWEEP, "hydra.launcher.ray.remote.num_cpus=1"))
        assert code == 0, err
        assert len(executions(site)) == JOBS and len(published(site)) == 1 + JOBS
        assert (site / "outputs" / "locks" / "shared").exists(), "jobs on several machines use leases"
    finally:
        head.terminate()
        head.communicate(timeout=300)


@pytest.mark.parametrize(
    "launcher, sentence",
    [
        ("parallel", "hydra/launcher: joblib is not installed; to have it, pip install 'llmpress[joblib]'"),
        ("paralel", "hydra/launcher: there is no 'paralel'; did you mean 'parallel'?"),
    ],
)
def test_a_launcher_that_is_not_there_is_one_sentence(run: Run, folder: Path, launcher: str, sentence: str) -> None:
    outcome = run("-m", f"hydra/launcher={launcher}", "recipe=mine.yaml", blocked=("hydra_plugins",))
    assert outcome.code == 2 and outcome.errors == [f"error: {sentence}"], outcome.err
    assert not (folder / "outputs").exists()
