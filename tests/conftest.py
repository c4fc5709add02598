"""Fixtures for every test; those of a session exist once."""

from pipeline.worker import set_library_defaults

set_library_defaults()  # before torch is imported: stages that run in this process then behave as in a worker

from tests.toys.fixtures import bench, fork_server, spawn_bench, toys_path  # noqa: E402

__all__ = ["bench", "fork_server", "spawn_bench", "toys_path"]
