"""Flocks and leases: one holder at a time, also across machines, and what happens when there are two all the same.

Other machines are processes here that have a host name of their own, so that nobody can ask whether they live.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.claim import Claims, LockKind
from pipeline.collect import collect, using
from pipeline.errors import StoreError
from pipeline.store import Store, check_writable
from tests.pipeline.test_store import KEY, manifest_of

LEASE = 1.0  # seconds
GUARD = 300.0  # seconds after which a test that would hang ends
HOLDER = """
import socket, sys, time
from pathlib import Path
host, root, kind, action, lease = sys.argv[1:]
if host:
    socket.gethostname = lambda: host
from pipeline.store import Store
from tests.pipeline.test_claim import KEY, manifest_of
store = Store(Path(root), kind)
store.claims.lease = float(lease)
with store.lock(KEY):
    scratch = store.scratch(KEY)
    (scratch / "report.json").write_text(host or "here")
    print("held", flush=True)
    if action == "hold":
        time.sleep(3600)
    sys.stdin.readline()
    store.publish(scratch, manifest_of(scratch))
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Another process that holds KEY and has written into its scratch folder; with `publish` it does so at the next line of its input."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: LockKind, action: str = "hold", host: str = "", lease: float = LEASE) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", HOLDER, host, str(tmp_path), kind, action, str(lease)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def store_at(root: Path, kind: LockKind, lease: float = LEASE) -> Store:
    store = Store(root, kind)
    store.claims.lease = lease
    return store


@pytest.mark.parametrize("kind", ["file", "lease"])
def test_a_live_holder_keeps_its_claim(tmp_path: Path, hold: Hold, kind: LockKind) -> None:
    hold(kind)
    with pytest.raises(TimeoutError, match=f"another run holds {KEY[:12]}"), store_at(tmp_path, kind).lock(KEY, timeout=2 * LEASE):
        pass


@pytest.mark.parametrize("kind", ["file", "lease"])
def test_a_killed_holder_s_claim_is_taken_over_without_waiting_for_a_lease(tmp_path: Path, hold: Hold, kind: LockKind) -> None:
    holder = hold(kind, lease=10 * GUARD)
    holder.kill()
    holder.wait()  # a process that nobody has waited for is still there
    store = store_at(tmp_path, kind, lease=10 * GUARD)
    with store.lock(KEY, timeout=GUARD):
        assert (store.scratch(KEY) / "report.json").read_text() == "here", "what it left can be continued"


def test_a_dead_holder_on_another_machine_is_replaced_when_its_lease_has_run_out(tmp_path: Path, hold: Hold) -> None:
    hold("lease", host="elsewhere").kill()
    (lease,) = (tmp_path / "locks").glob("*.lease")
    touched = lease.stat().st_mtime
    with store_at(tmp_path, "lease").lock(KEY, timeout=GUARD):
        assert time.time() - touched > 0.9 * LEASE, "nobody here can know that it is dead before"


def test_a_machine_that_stood_still_cannot_write_into_its_successor_s_work_nor_publish(tmp_path: Path, hold: Hold) -> None:
    stopped, store = hold("lease", "publish", host="elsewhere"), store_at(tmp_path, "lease")
    stopped.send_signal(signal.SIGSTOP)
    with store.lock(KEY, timeout=GUARD):
        scratch = store.scratch(KEY)
        assert [folder.name for folder in (tmp_path / "scratch").iterdir()] == [scratch.name], "it was moved, not copied"
        (scratch / "report.json").write_text("successor")
        stopped.send_signal(signal.SIGCONT)
        _, err = stopped.communicate("publish\n", timeout=GUARD)
        assert stopped.returncode != 0 and "another run took it over, because this one gave no sign of life" in err
        store.publish(scratch, manifest_of(scratch))
    assert (store.path("evaluate", KEY) / "report.json").read_text() == "successor"


def test_of_two_holders_at_once_the_first_to_publish_wins_and_the_other_takes_that(tmp_path: Path) -> None:
    """As where the second found no scratch folder to take over, because the first had not made it yet."""
    first, second = store_at(tmp_path, "lease"), store_at(tmp_path, "lease")

    def both_publish() -> None:
        with second.lock(KEY):
            folders = [store.scratch(KEY) for store in (first, second)]
            assert folders[0] != folders[1]
            for folder, content in zip(folders, ("first", "second"), strict=True):
                (folder / "report.json").write_text(content)
            for store, folder in zip((first, second), folders, strict=True):
                store.publish(folder, manifest_of(folder))

    with first.lock(KEY):
        (tmp_path / "locks" / f"{KEY[:12]}.lease").unlink()
        thread = threading.Thread(target=both_publish)
        thread.start()
        thread.join()
    assert (first.path("evaluate", KEY) / "report.json").read_text() == "first"
    assert not os.listdir(tmp_path / "scratch")


def test_auto_follows_what_the_store_was_used_with(tmp_path: Path) -> None:
    def files(kind: LockKind) -> list[str]:
        with Claims(tmp_path, kind).hold("name"):
            return sorted(path.name for path in tmp_path.iterdir())

    assert files("auto") == ["name.lock"]
    assert "name.lease" in files("lease")
    assert "name.lease" in files("auto") and "name.lease" in files("file"), "a flock would not be seen by those who use leases"


@pytest.mark.parametrize("kind", ["file", "lease"])
def test_nothing_is_collected_while_a_run_goes_on_and_one_that_is_dead_does_not_count(tmp_path: Path, kind: LockKind) -> None:
    check_writable(tmp_path)
    store, outcomes = store_at(tmp_path, kind), []

    def try_to_collect() -> None:
        try:
            outcomes.append(str(collect(store_at(tmp_path, kind)).kept))
        except StoreError as error:
            outcomes.append(str(error))

    with using(store):
        other = threading.Thread(target=try_to_collect)
        other.start()
        other.join()
        (announced,) = (tmp_path / "locks").glob("run-*")
        left = announced.with_stem("run-elsewhere-4711-0badcafe")  # as a machine leaves it that is switched off
        left.write_text(announced.read_text().replace(os.uname().nodename, "elsewhere"))
    os.utime(left, (time.time() - 2 * LEASE,) * 2)
    assert outcomes == [f"process {os.getpid()} of {os.uname().nodename} is running a recipe in {tmp_path}; run mode=gc when it has ended"]
    try_to_collect()
    assert outcomes[1:] == ["0"]
    assert not list((tmp_path / "locks").glob("run-*")), "neither a run that has ended nor a dead one leaves its file"
