"""Whatever kills a run, nothing half-made is left, no process stays behind, and the same command continues."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests import toys
from tests.toys.fixtures import Bench

PUBLISHING_CALLS = 8  # fsync, chmod and rename, for an artifact of one file


def result_of(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_workers(bench: Bench, count: int = 1) -> None:
    toys.wait_until(lambda: len(bench.pids()) >= count)


def nobody_is_left(bench: Bench) -> None:
    toys.wait_until(lambda: not any(map(toys.is_alive, bench.pids())))


@pytest.mark.parametrize("call", range(1, PUBLISHING_CALLS + 1))
def test_a_run_killed_at_any_step_of_publishing_leaves_nothing_or_a_whole_artifact(spawn_bench: Bench, call: int) -> None:
    code, _, err = result_of(spawn_bench.drive(stages={"toy": {}}, die_before=call))
    assert code == -signal.SIGKILL, err
    published = list(spawn_bench.store.all())
    assert len(published) == (1 if call == PUBLISHING_CALLS else 0), "only the last call comes after the artifact is in place"
    (result,) = spawn_bench.run(toy={})
    assert result.status == ("hit" if published else "ran")
    assert spawn_bench.store.find("toy", result.node.key) == result.manifest
    assert (result.path / "report.json").read_text() == "{}" and not os.listdir(spawn_bench.store.root / "scratch")


def test_publishing_makes_no_call_that_is_not_tried_above(spawn_bench: Bench) -> None:
    code, out, err = result_of(spawn_bench.drive(stages={"toy": {}}))
    assert code == 0, err
    assert json.loads(out)["calls"] == ["fsync", "chmod", "fsync", "fsync", "rename", "fsync", "rename", "fsync"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_stage_and_the_same_command_continues(spawn_bench: Bench, number: int) -> None:
    stages = {"toy": {}, "toy.second": {"action": "stop", "witness": str(spawn_bench.witness)}}
    process = spawn_bench.drive(stages=stages)
    wait_for_workers(spawn_bench)
    os.killpg(process.pid, number)  # as a terminal does it: to the whole foreground group
    code, _, err = result_of(process)
    assert code == 130
    assert err == "interrupted during toy_second; what is finished is kept, and the same command continues from there\n"
    nobody_is_left(spawn_bench)
    assert [manifest.stage for _, manifest in spawn_bench.store.all()] == ["toy"] and not os.listdir(spawn_bench.store.root / "scratch")
    assert spawn_bench.run(toy={})[0].status == "hit"


def test_a_run_in_the_background_is_not_ended_by_a_ctrl_c_meant_for_another(spawn_bench: Bench) -> None:
    """A shell without job control, and nohup in it, start with SIGINT ignored; SIGTERM still ends such a run, as above."""
    background = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    process = spawn_bench.drive(background, stages={"toy": {"action": "slow", "witness": str(spawn_bench.witness)}})
    wait_for_workers(spawn_bench)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = result_of(process)
    assert code == 0, err
    assert json.loads(out)["statuses"] == ["ran"]


@pytest.mark.parametrize("spawn", [True, False])
def test_no_worker_outlives_a_killed_run_even_while_it_holds_the_gil(spawn_bench: Bench, spawn: bool) -> None:
    process = spawn_bench.drive(stages={"toy": {"action": "hold_gil", "witness": str(spawn_bench.witness)}}, spawn=spawn)
    wait_for_workers(spawn_bench)
    (worker,) = spawn_bench.pids()
    parent = int(next(line for line in Path(f"/proc/{worker}/status").read_text().splitlines() if line.startswith("PPid")).split()[1])
    assert (parent == process.pid) == spawn, "the fork server stands between them"
    process.kill()
    process.communicate()
    nobody_is_left(spawn_bench)
    toys.wait_until(lambda: not toys.is_alive(parent))
    assert not list(spawn_bench.store.all())


def test_two_runs_that_want_the_same_artifact_compute_it_once(spawn_bench: Bench) -> None:
    stages = {"toy": {"action": "slow", "witness": str(spawn_bench.witness)}}
    runs = [spawn_bench.drive(stages=stages, run=f"run{number}") for number in range(2)]
    statuses = []
    for run in runs:
        code, out, err = result_of(run)
        assert code == 0, err
        statuses += json.loads(out)["statuses"]
    assert sorted(statuses) == ["hit", "ran"] and len(spawn_bench.pids()) == 1


def test_a_run_that_waited_for_a_killed_one_takes_over(spawn_bench: Bench) -> None:
    stages = {"toy": {"action": "slow", "witness": str(spawn_bench.witness)}}
    first = spawn_bench.drive(stages=stages, run="first")
    wait_for_workers(spawn_bench)
    second = spawn_bench.drive(stages=stages, run="second")
    first.kill()
    first.communicate()
    code, out, err = result_of(second)
    assert code == 0, err
    assert json.loads(out)["statuses"] == ["ran"] and len(spawn_bench.pids()) == 2


def test_a_full_disk_is_one_sentence_and_freed_again(spawn_bench: Bench) -> None:
    """On a file system of 4 MB, which exists for this process only."""
    outputs = spawn_bench.store.root
    outputs.mkdir()
    make = f'mount -t tmpfs -o size=4m tmpfs "{outputs}"'
    mount = ("unshare", "-rm", "sh", "-c", f'{make} && "$@"; code=$?; ls -A "{outputs}/scratch"; exit $code', "sh")
    trial = ("unshare", "-rm", "sh", "-c", make)
    if shutil.which("unshare") is None or subprocess.run(trial, capture_output=True).returncode != 0:
        pytest.skip("this system lets no user mount a file system of its own")
    code, out, err = result_of(spawn_bench.drive(mount, stages={"toy": {"action": "fill_disk"}}))
    assert code == 5, err
    assert err.startswith("toy: the disk of ") and "is full; free some space" in err and "Traceback" not in err
    assert out == "", "no half artifact keeps the disk full"
