"""Fixtures for every test; those of a session exist once."""

import os
import signal
from collections.abc import Iterator

import pytest

from pipeline.compute_dtype import DECIDED
from pipeline.library_defaults import set_library_defaults
from pipeline.machine import core_count
from pipeline.rates import GIVEN, LOOP, Rates

os.environ.setdefault(DECIDED, "fp32")  # results, keys and plans are then the same on any machine; tests of bf16 say so
os.environ.setdefault(
    GIVEN, Rates(flops=1e12, float32_flops=1e11, bandwidth=2e10, loop=LOOP, threads=2).model_dump_json()
)  # likewise hours
set_library_defaults()  # before torch is imported: stages that run in this process then behave as in a worker
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the cores, as the jobs of a sweep do
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, core_count() // workers)))

from tests.toys.fixtures import bench, fork_server, spawn_bench, toys_path  # noqa: E402

__all__ = ["bench", "fork_server", "spawn_bench", "toys_path"]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_reaches_what_tests_start() -> Iterator[None]:
    """Where the suite was started with SIGINT ignored (`nohup make test &`, some CI runners), so would be every program it starts.

    A handler is not inherited as SIG_IGN is: with one that does nothing the suite still goes on, and its children have the default.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's processor is taken to have units for bf16, whatever it is."""
    monkeypatch.setenv(DECIDED, "bf16")
