"""The child process: its folder is the protocol, and every end is a sentence."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.worker import EXIT_CODES, RESPONSE, EventLog, Failure, Request, Success, explain
from tests import toys


def prepare(folder: Path, stage: str = "toy", kind: str = "EvalReport", port: str = "report", **params: Any) -> Request:
    model = toys.write_model(folder / "model")
    output = folder / "output"
    output.mkdir()
    request = Request.model_validate(
        {
            "node": "n", "stage": stage, "params": params, "execution": {}, "key": "k", "output": output,
            "inputs": {"model": {"type": "DenseCheckpoint", "path": model, "key": "m", "spec": None}},
            "expected": {port: None}, "types": {port: kind},
        }
    )  # fmt: skip
    (folder / "request.json").write_text(request.model_dump_json())
    return request


def work(folder: Path) -> tuple[int, Success | Failure, str]:
    done = subprocess.run([sys.executable, "-m", "pipeline.worker", str(folder)], capture_output=True, text=True)
    return done.returncode, RESPONSE.validate_json((folder / "response.json").read_bytes()), done.stdout + done.stderr


@pytest.mark.usefixtures("toys_path")
class TestRunJob:
    def test_a_stage_that_succeeds_leaves_its_output_events_and_a_response(self, tmp_path: Path) -> None:
        request = prepare(tmp_path, action="slow", value=3.0)
        code, response, printed = work(tmp_path)
        assert isinstance(response, Success) and code == 0
        assert response.outputs["report"].model_dump() == {"type": "EvalReport", "path": ".", "metrics": {"value": 3.0}}
        assert response.seconds >= 1.0 and response.peak_rss > 10_000_000
        assert response.peak_vram is None, "this stage uses no GPU"
        assert {"python", "hostname", "pydantic", "torch"} <= set(response.environment)
        assert (request.output / "report.json").exists()
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        progress = [event["done"] for event in events if event["event"] == "progress"]
        assert 5 <= len(progress) <= 40 and progress[-1] == 1000, "1000 reports in a second are thinned, the last one is kept"
        assert [event["metrics"] for event in events if event["event"] == "curve"] == [{"loss": 2.5}]
        assert "toy runs slow" in printed

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what is resident now")
    def test_memory_above_the_floor_is_what_the_stage_took(self, tmp_path: Path) -> None:
        prepare(tmp_path, action="as_planned")
        _, response, _ = work(tmp_path)
        assert isinstance(response, Success) and response.floor_rss is not None
        assert response.floor_rss > 10_000_000, "an interpreter and pydantic"
        assert response.peak_rss - response.floor_rss == pytest.approx(100_000_000, rel=0.2)

    @pytest.mark.parametrize(
        ("action", "kind", "message"),
        [
            ("raise", "error", "KeyError: 'no such layer'"),
            ("refuse", "input", "the calibration text has 3 windows, 128 were asked for; give more text"),
            ("wrong_type", "error", "TypeError: toy.run returned DenseCheckpoint as report; the plan says EvalReport"),
            ("wrong_place", "error", "TypeError: toy.run returned {output}/sub as report; its place is {output}"),
        ],
    )
    def test_a_failure_is_one_sentence_and_its_traceback_is_in_the_log(self, tmp_path: Path, action: str, kind: str, message: str) -> None:
        request = prepare(tmp_path, action=action)
        code, response, printed = work(tmp_path)
        assert isinstance(response, Failure)
        assert (response.kind, response.message) == (kind, message.format(output=request.output))
        assert code == EXIT_CODES[response.kind]
        assert "Traceback" in printed

    def test_a_request_that_cannot_be_read_is_a_failure_too(self, tmp_path: Path) -> None:
        code, response, _ = work(tmp_path)
        assert isinstance(response, Failure) and "request.json" in response.message and code == 1


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (chained(ValueError("cannot load"), MemoryError()), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (Exception('Error while serializing: I/O error: No space left on device (os error 28)'), "disk"),
        (ValueError("a ratio must be below 1"), "input"),
        (ValueError(), "error"),
        (SystemExit(3), "error"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
        (ValueError("the memory of a goldfish"), "input"),
    ],
)  # fmt: skip
def test_what_ended_a_stage_is_told_apart(error: BaseException, kind: str) -> None:
    assert explain(error)[0] == kind


def test_a_sentence_is_one_line() -> None:
    assert explain(ValueError("two\n  lines")) == ("input", "two lines")
    assert explain(RuntimeError("first\nC++ frames")) == ("error", "RuntimeError: first")


def test_events_carry_scalars_of_numeric_libraries() -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.5

    stream = io.StringIO()
    EventLog(stream).emit({"event": "curve", "step": 1, "metrics": {"loss": Scalar()}})
    assert json.loads(stream.getvalue())["metrics"] == {"loss": 0.5}


@pytest.mark.parametrize("module", ["pipeline.worker", "pipeline.forkserver", "pipeline.executor", "pipeline.progress"])
def test_nothing_heavy_is_imported_before_a_stage_runs(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'mlflow', 'hydra', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
