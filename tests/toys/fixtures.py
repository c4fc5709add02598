"""What the tests of execution share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.executor import NodeResult, execute
from pipeline.plan import Plan
from pipeline.process import ForkServer
from pipeline.stage import find_stage, plugin_paths
from pipeline.store import Store
from tests import toys


@pytest.fixture(scope="session")
def toys_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The toys installed, for this process and those it starts."""
    path = toys.install(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setattr(sys, "path", [*path.split(os.pathsep), *sys.path])
        plugin_paths.cache_clear()
        find_stage.cache_clear()
        yield path
    plugin_paths.cache_clear()
    find_stage.cache_clear()


@pytest.fixture(scope="session")
def fork_server(toys_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One for all tests: its start takes seconds."""
    with ForkServer(tmp_path_factory.mktemp("server") / "server.log") as server:
        server.start()
        yield server


@dataclass
class Bench:
    """A store, a model and a way to run toys on it in this process."""

    folder: Path
    server: ForkServer
    python_path: str

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "outputs")
        self.run_dir = self.folder / "run"
        self.witness = self.folder / "witness"
        self.model = toys.write_model(self.folder / "model")
        self.events: list[dict[str, Any]] = []

    def plan(self, **stages: dict[str, Any]) -> Plan:
        return toys.plan_of(self.store, self.model, stages)

    def run(self, *listeners: Callable[[dict[str, Any]], None], **stages: dict[str, Any]) -> list[NodeResult]:
        self.events.clear()
        return execute(self.plan(**stages), self.store, self.run_dir, [self.events.append, *listeners], self.server)

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def pids(self) -> list[int]:
        """Of every process that ran, or was left behind by, a stage with `witness`."""
        return [int(line) for line in self.witness.read_text().split()] if self.witness.exists() else []

    def drive(self, prefix: tuple[str, ...] = (), **wanted: Any) -> "subprocess.Popen[str]":
        """The same in a main process of its own (see tests/toys/driver.py)."""
        request = {"outputs": str(self.store.root), "model": str(self.model), **wanted}
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.toys.driver", json.dumps(request)],
            env={**os.environ, "PYTHONPATH": self.python_path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def bench(tmp_path: Path, fork_server: ForkServer, toys_path: str) -> Bench:
    """Workers are forked."""
    return Bench(tmp_path, fork_server, toys_path)


@pytest.fixture
def spawn_bench(tmp_path: Path, toys_path: str) -> Bench:
    """Workers are fresh interpreters."""
    return Bench(tmp_path, toys.spawning(tmp_path / "server.log"), toys_path)
