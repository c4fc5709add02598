"""Calls into another interpreter: what they need there, what comes back, and how they fail."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.installed import package_path
from pipeline.isolated import Isolated, IsolatedFailure
from pipeline.stage import BUILT_IN
from pipeline.worker import explain
from tests.pipeline.bare_environment import make_bare_environment, site_packages

ROOT = Path(__file__).parents[2]
BACKEND = """
import os, signal, sys, time

def doubled(ctx, value):
    ctx.progress("doubling", 1, 1)
    ctx.note("it was doubled")
    (ctx.output / "made.txt").write_text(str(2 * value))
    return {"value": 2 * value, "path": os.environ["PATH"].split(os.pathsep)[0], "cwd": os.getcwd()}

def sees(ctx, package):
    import importlib.util
    return {"found": importlib.util.find_spec(package) is not None}

def refuses(ctx):
    raise ValueError("num_bits: it cannot do that")

def leaves(ctx):
    sys.exit("a loader that ends the process")

def waits(ctx):
    (ctx.output / "pid").write_text(str(os.getpid()))
    while True:
        time.sleep(1)

def dies(ctx):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "environment"
    interpreter = make_bare_environment(folder)
    (site_packages(folder) / "small_backend.py").write_text(BACKEND)
    return interpreter


@pytest.fixture
def isolated(python: Path, tmp_path: Path) -> Isolated:
    (tmp_path / "job").mkdir()
    (tmp_path / "output").mkdir()
    return Isolated(python, tmp_path / "job", tmp_path / "output")


def test_the_worker_and_every_stage_file_import_with_pydantic_alone(python: Path) -> None:
    modules = ["pipeline.worker", "pipeline.isolated_worker", "pipeline.stage", "pipeline.artifact", "pipeline.spec", "pipeline.errors"]
    stages = [path.partition(":")[0] for path in BUILT_IN.values()]
    code = f"import importlib; [importlib.import_module(name) for name in {modules + stages!r}]"
    done = subprocess.run([python, "-P", "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    for absent in ("torch", "yaml", "numpy", "filelock"):
        missing = subprocess.run([python, "-P", "-c", f"import {absent}"], env={}, capture_output=True, text=True, cwd="/")
        assert "ModuleNotFoundError" in missing.stderr, f"{absent} is there, so the environment proves nothing"


def test_a_call_returns_its_value_and_its_events_are_the_stages_own(isolated: Isolated, python: Path) -> None:
    made = isolated("small_backend:doubled", value=21)
    assert made["value"] == 42 and made["path"] == str(python.parent)
    assert made["cwd"].startswith(str(isolated.job)), "what a library writes to where it runs lies with the job"
    assert (isolated.output / "made.txt").read_text() == "42"
    events = [json.loads(line) for line in (isolated.job / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["progress", "note"]
    (returned,) = isolated.returned
    assert returned.environment["python"] and "torch" not in returned.environment, "it is what lies there, not here"
    assert returned.peak_rss > 10_000_000


@pytest.mark.parametrize("package", ["torch", "filelock", "tests"])
def test_nothing_of_the_callers_environment_is_seen_there(isolated: Isolated, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(os.__file__).parent / "site-packages")]))
    assert isolated("small_backend:sees", package=package) == {"found": False}


@pytest.mark.parametrize(
    ("function", "kind", "sentence"),
    [
        ("refuses", "input", "num_bits: it cannot do that"),
        ("leaves", "error", "SystemExit: a loader that ends the process"),
        ("dies", "error", "was killed by signal 9 (SIGKILL) and without a result"),
        ("is_not_there", "error", "AttributeError"),
    ],
)
def test_a_call_that_fails_is_a_sentence_of_its_kind(isolated: Isolated, function: str, kind: str, sentence: str) -> None:
    with pytest.raises(IsolatedFailure) as caught:
        isolated(f"small_backend:{function}")
    assert sentence in str(caught.value)
    assert explain(caught.value) == (kind, " ".join(str(caught.value).split())), "the stage fails for the same reason"


def test_a_failure_is_not_taken_for_the_result_of_the_call_before(isolated: Isolated) -> None:
    isolated("small_backend:doubled", value=1)
    with pytest.raises(IsolatedFailure, match="killed"):
        isolated("small_backend:dies")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a child with its parent only there")
def test_the_other_interpreter_does_not_outlive_a_stage_that_is_killed(python: Path, tmp_path: Path) -> None:
    for part in ("job", "output"):
        (tmp_path / part).mkdir()
    paths = ", ".join(f"Path({str(path)!r})" for path in (python, tmp_path / "job", tmp_path / "output"))
    code = f"from pathlib import Path; from pipeline.isolated import Isolated; Isolated({paths})('small_backend:waits')"
    stage = subprocess.Popen([sys.executable, "-P", "-c", code], env={**os.environ, **package_path()})
    written = tmp_path / "output" / "pid"
    pid = wait_for(lambda: written.read_text() if written.exists() else "")
    stage.kill()
    stage.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def wait_for(found: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value
