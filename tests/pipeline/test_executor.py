"""A plan's nodes run, are published and are found again; whatever ends a stage becomes one sentence."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PlanError, StageFailed, StoreError
from pipeline.executor import execute
from pipeline.store import Store
from tests import toys
from tests.toys.fixtures import Bench


def nothing_is_left(bench: Bench) -> bool:
    """No artifact, no half of one, no process."""
    scratch = bench.store.root / "scratch"
    return not list(bench.store.all()) and not (scratch.exists() and os.listdir(scratch)) and not any(map(toys.is_alive, bench.pids()))


class TestSuccess:
    def test_nodes_run_once_and_are_hits_afterwards(self, bench: Bench) -> None:
        stages: dict[str, Any] = {"toy_copy": {}, "toy_pair": {}, "toy": {"value": 2.0}}
        first = bench.run(**stages)
        assert [result.status for result in first] == ["ran"] * 3
        assert [event["event"] for event in bench.events] == [
            "run_started", *["node_started", "node_finished"] * 2, "node_started", "note", "node_finished", "run_finished",
        ]  # fmt: skip
        again = bench.run(**stages)
        assert [result.status for result in again] == ["hit"] * 3
        assert [event["event"] for event in bench.events] == ["run_started", *["node_hit"] * 3, "run_finished"]
        assert [(a.path, a.manifest) for a in again] == [(b.path, b.manifest) for b in first]

    def test_a_manifest_tells_the_whole_story(self, bench: Bench) -> None:
        copied, paired, toy = bench.run(toy_copy={}, toy_pair={}, toy={"value": 2.0})
        manifest = toy.manifest
        assert (manifest.type, manifest.key, manifest.version) == ("EvalReport", toy.node.key, 1)
        assert manifest.params == {"action": "write", "witness": "", "value": 2.0}
        assert manifest.metrics == {"value": 2.0} and manifest.notes == ("a note from the worker",)
        assert [stage.node for stage in manifest.history] == ["toy_copy", "toy_pair", "toy"]
        assert manifest.inputs == {"model": toy.node.input_keys["model"]} and set(manifest.read) == {"model"}
        assert set(manifest.files) == {"report.json"} and manifest.execution == {"memory_limit": None}
        assert manifest.peak_rss > 0 and manifest.environment["python"]
        assert copied.manifest.spec == copied.node.expected["model"] and copied.manifest.spec is not None
        assert paired.manifest.outputs == {"model": "DenseCheckpoint", "report": "EvalReport"}
        assert paired.manifest.metrics == {"report.loss": 2.0} and paired.manifest.read == {}
        assert (paired.path / "model" / "config.json").exists()

    def test_the_finished_event_says_what_was_made(self, bench: Bench) -> None:
        (result,) = bench.run(toy={"action": "slow"})
        (event,) = bench.told("node_finished")
        assert (event["key"], event["path"], event["metrics"]) == (result.node.key, str(result.path), {"value": 1.0})
        assert event["nbytes"] == 2 and event["peak_rss"] > 0 and event["seconds"] >= 1.0
        assert bench.told("progress")[-1]["done"] == 1000 and bench.told("progress")[-1]["node"] == "toy"
        assert bench.told("curve")[0]["metrics"] == {"loss": 2.5}

    def test_a_run_of_hits_starts_no_process(self, spawn_bench: Bench) -> None:
        spawn_bench.run(toy={})
        results = execute(spawn_bench.plan(toy={}), spawn_bench.store, spawn_bench.run_dir)
        assert results[0].status == "hit"
        assert not (spawn_bench.run_dir / "logs" / "forkserver.log").exists(), "the fork server writes its log when it starts"

    def test_fresh_interpreters_are_used_with_a_warning(self, spawn_bench: Bench) -> None:
        spawn_bench.run(**{"toy": {}, "toy.again": {"value": 2.0}})
        assert [event["text"] for event in spawn_bench.told("warning")] == [
            "stages start in fresh interpreters, which takes seconds each: the test says so"
        ]

    def test_other_code_is_mentioned_at_a_hit(self, bench: Bench) -> None:
        (result,) = bench.run(toy={})
        record = result.path / "artifact.json"
        record.write_text(result.manifest.model_copy(update={"fingerprint": "0123"}).model_dump_json())
        bench.run(toy={})
        assert "other code of toy" in bench.told("node_hit")[0]["notes"][-1]


class TestReports:
    def test_a_report_on_bytes_that_changed_is_made_again(self, bench: Bench) -> None:
        """A rebuilt checkpoint of the same key may differ, as results of GPUs do."""
        copied, toy = bench.run(toy_copy={}, toy={})
        weights = copied.path / "model.safetensors"
        os.chmod(weights, 0o644)
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        weights.write_bytes(changed)
        record = json.loads((copied.path / "artifact.json").read_text())
        record["files"]["model.safetensors"]["sha256"] = "f" * 64
        (copied.path / "artifact.json").write_text(json.dumps(record))
        again = bench.run(toy_copy={}, toy={})
        assert [result.status for result in again] == ["hit", "ran"]
        assert again[1].path == toy.path and again[1].manifest.read != toy.manifest.read
        assert [result.status for result in bench.run(toy_copy={}, toy={})] == ["hit", "hit"]


class TestFailure:
    @pytest.mark.parametrize(
        ("action", "reason"),
        [
            ("raise", "KeyError: 'no such layer'"),
            ("refuse", "the calibration text has 3 windows, 128 were asked for; give more text"),
            ("exit", "ended with exit status 7 and without a result"),
            ("kill", "was killed by signal 9 (SIGKILL): planned peak 100 MB, used at least"),
            ("abort", "was killed by signal 6 (SIGABRT)"),
        ],
    )
    def test_a_stage_that_breaks_becomes_a_sentence(self, bench: Bench, action: str, reason: str) -> None:
        with pytest.raises(StageFailed) as failure:
            bench.run(toy={"action": action, "witness": str(bench.witness)})
        error = failure.value
        assert error.reason.startswith(reason) and error.node == "toy" and error.exit_code == 4
        assert f"toy runs {action}" in Path(error.log).read_text() and error.tail
        assert "0 B" not in error.reason, "the peak of a killed worker was sampled while it ran"
        assert nothing_is_left(bench)
        assert bench.told("node_failed")[0]["reason"] == error.reason and bench.told("run_finished")[0]["status"] == "failed"

    def test_the_next_run_continues_after_the_last_good_stage(self, bench: Bench) -> None:
        with pytest.raises(StageFailed):
            bench.run(toy_copy={}, toy={"action": "raise"})
        assert [result.status for result in bench.run(toy_copy={}, toy={})] == ["hit", "ran"]

    @pytest.mark.parametrize("action", ["allocate", "allocate_torch"])
    def test_a_memory_limit_ends_the_stage_with_planned_against_used(self, bench: Bench, action: str) -> None:
        with pytest.raises(StageFailed, match=r"ran out of memory: planned peak 100 MB, limit 3 GB, used at least [1-9]\d* MB"):
            bench.run(toy={"action": action, "witness": str(bench.witness), "execution": {"memory_limit": "3GB"}})
        assert nothing_is_left(bench)

    def test_a_damaged_checkpoint_does_not_pass_the_guard(self, bench: Bench) -> None:
        with pytest.raises(StageFailed, match="truncated"):
            bench.run(toy_copy={"damage": True})
        assert nothing_is_left(bench)

    def test_too_little_disk_is_said_before_anything_runs(self, bench: Bench) -> None:
        with pytest.raises(StoreError, match=r"toy: needs 1e\+06 TB of disk and .* are free in .*outputs"):
            bench.run(toy={"action": "no_disk", "witness": str(bench.witness)})
        assert nothing_is_left(bench) and not bench.pids()

    def test_a_plan_with_pending_keys_is_refused(self, spawn_bench: Bench) -> None:
        plan = spawn_bench.plan(toy={})
        pending = replace(plan, nodes=tuple(replace(node, key="", status="pending") for node in plan.nodes))
        with pytest.raises(PlanError, match=r"stages\.toy: the key is pending"):
            execute(pending, spawn_bench.store, spawn_bench.run_dir)
        assert not spawn_bench.run_dir.exists()

    def test_an_outputs_folder_that_cannot_be_written_is_one_sentence(self, spawn_bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a file where a folder should be")  # fails for root too, whom no permission stops
        store = Store(tmp_path / "file" / "outputs")
        with pytest.raises(StoreError, match=r"file/outputs"):
            execute(spawn_bench.plan(toy={}), store, spawn_bench.run_dir)


def test_a_listener_that_raises_is_reported_once_and_the_run_goes_on(bench: Bench) -> None:
    def broken(event: dict[str, Any]) -> None:
        raise ConnectionError("no tracking server")

    assert bench.run(broken, toy={})[0].status == "ran"
    (warning,) = bench.told("warning")
    assert "broken failed at run_started: ConnectionError: no tracking server; the run goes on" in warning["text"]


def test_a_stage_that_resumes_finds_what_it_left(bench: Bench) -> None:
    with pytest.raises(StageFailed, match="killed by signal 9"):
        bench.run(toy_resume={})
    assert [result.status for result in bench.run(toy_resume={})] == ["ran"]
    (result,) = bench.run(toy_resume={})
    assert (result.status, set(result.manifest.files)) == ("hit", {"half"})


def test_an_attempt_killed_while_publishing_does_not_confuse_one_that_resumes(bench: Bench) -> None:
    with pytest.raises(StageFailed):
        bench.run(toy_resume={})
    scratch = next(path for path in (bench.store.root / "scratch").iterdir() if path.is_dir())
    (scratch / "artifact.tmp").write_text("{")
    (scratch / "artifact.json").write_text("{}")
    (result,) = bench.run(toy_resume={})
    assert set(result.manifest.files) == {"half"}
    assert bench.store.find("toy_resume", result.node.key) == result.manifest


def test_sigterm_is_restored_after_a_run(spawn_bench: Bench) -> None:
    before = signal.getsignal(signal.SIGTERM)
    spawn_bench.run(toy={})
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_artifact_that_lost_a_file_is_made_again(bench: Bench) -> None:
    (first,) = bench.run(toy={})
    (first.path / "report.json").unlink()
    (second,) = bench.run(toy={})
    assert second.status == "ran" and (second.path / "report.json").exists()
    shutil.rmtree(second.path)
    assert bench.run(toy={})[0].status == "ran"
