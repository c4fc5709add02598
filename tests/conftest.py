"""Fixtures for every test; those of a session exist once."""

import os

from pipeline.compute_dtype import DECIDED
from pipeline.worker import set_library_defaults

os.environ.setdefault(DECIDED, "fp32")  # results, keys and plans are then the same on any machine; tests of bf16 say so
set_library_defaults()  # before torch is imported: stages that run in this process then behave as in a worker

import pytest  # noqa: E402

from tests.toys.fixtures import bench, fork_server, spawn_bench, toys_path  # noqa: E402

__all__ = ["bench", "fork_server", "spawn_bench", "toys_path"]


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's processor is taken to have units for bf16, whatever it is."""
    monkeypatch.setenv(DECIDED, "bf16")
