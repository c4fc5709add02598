"""Fixtures for every test; those of a session exist once."""

from tests.toys.fixtures import bench, fork_server, spawn_bench, toys_path

__all__ = ["bench", "fork_server", "spawn_bench", "toys_path"]
