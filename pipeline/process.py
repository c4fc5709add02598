"""Worker processes as the main process holds them: started, waited for, killed.

`ForkServer` is the client of `pipeline.forkserver` and starts it on first use, so that a run in which every stage is a hit never pays
for it. Where the server says that forking is not safe, the same jobs run as `python -m pipeline.worker`. Start it from the main
thread: the kernel ends the server with the thread that started it.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.errors import LlmpressError
from pipeline.installed import package_path

CLOSE_TIMEOUT = 5.0  # seconds a server may take to end before it is killed; it has nothing to save


class Worker(Protocol):
    """One running job. `returncode` is None while it runs, then as in subprocess: negative is the signal that killed it."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None) -> int | None:
        """Wait at most `timeout` seconds (None: until the end). Returns `returncode`."""

    def send_signal(self, number: int) -> None:
        """To the worker and every process it has started."""


def kill(worker: Worker, grace: float = 2.0) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds or when interrupted once more. Returns when the worker is gone."""
    try:
        worker.send_signal(signal.SIGTERM)
        worker.wait(grace)
    finally:
        if worker.returncode is None:
            worker.send_signal(signal.SIGKILL)
            worker.wait(None)


class ForkServer:
    """Starts jobs. `log` takes what the server itself prints. Use as a context manager, or call `close`.

    `reason` says why workers are not forked; it is empty where they are, and known once a job has been started.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.reason = "" if sys.platform == "linux" else f"forking is not safe on {sys.platform}"
        self._server: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._received = b""
        self._workers: dict[int, _Forked] = {}

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to import the libraries, in the background. Does nothing when called again."""
        if self._server is not None or self.reason:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._server = _popen("pipeline.forkserver", str(os.getpid()), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def run(self, job: Path) -> Worker:
        """Start the job of that folder, after waiting for the server to be ready. LlmpressError where the server died."""
        self.start()
        while not self._ready and not self.reason:
            self._answer()
        if self.reason:
            return _Spawned(job)
        try:
            return self._start(job)
        except BaseException:  # interrupted between request and answer: a job may run that nobody holds
            self.close()
            raise

    def _start(self, job: Path) -> "_Forked":
        assert self._server and self._server.stdin
        try:
            self._server.stdin.write(json.dumps({"job": str(job)}).encode() + b"\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answer = self._answer()
        while "started" not in answer:  # a job before it has ended
            answer = self._answer()
        worker = self._workers[answer["started"]] = _Forked(self, answer["started"])
        return worker

    def close(self) -> None:
        """End the server, which ends what it has started. The next job starts a new one."""
        if self._server is None:
            return
        assert self._server.stdin and self._server.stdout
        with contextlib.suppress(BrokenPipeError):  # it is dead already
            self._server.stdin.close()
        try:
            self._server.wait(CLOSE_TIMEOUT if self._ready else 0)  # while it imports, it does not listen
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()
        self._server, self._ready, self._received = None, False, b""
        self._lose_workers(-signal.SIGKILL)

    def pump(self, timeout: float | None) -> None:
        """Take in what the server has to say, waiting at most `timeout` seconds for it. Its death ends every worker."""
        try:
            self._answer(timeout)
        except LlmpressError:
            assert self._server
            self._lose_workers(self._server.returncode or -signal.SIGKILL)

    def _lose_workers(self, code: int) -> None:
        for worker in self._workers.values():
            worker.returncode = code
        self._workers.clear()

    def _answer(self, timeout: float | None = None) -> dict[str, Any]:
        """The server's next line, acted upon; empty after `timeout` seconds without one."""
        assert self._server and self._server.stdout
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._received:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._server.stdout], [], [], left)[0]:
                return {}
            chunk = os.read(self._server.stdout.fileno(), 65536)
            if not chunk:
                raise self._died()
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "mode" in answer:
            self._ready, self.reason = answer["mode"] == "fork", answer["reason"]
        elif "ended" in answer:
            self._workers.pop(answer["ended"]).returncode = answer["status"]
        return answer

    def _died(self) -> LlmpressError:
        assert self._server
        code = self._server.wait()
        return LlmpressError(f"the process that starts stages ended by itself (exit status {code}); {self.log} may say why")


class _Forked:
    """A child of the fork server."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                break
            self.server.pump(left)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            _signal_group(self.pid, number)


class _Spawned:
    """A fresh interpreter, where forking is not safe."""

    def __init__(self, job: Path) -> None:
        with open(job / "log.txt", "ab") as log:
            self._process = _popen("pipeline.worker", str(job), str(os.getpid()), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self._process.pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None) -> int | None:
        try:
            self.returncode = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        _signal_group(self.pid, signal.SIGKILL)  # processes that the stage left behind
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            _signal_group(self.pid, number)


def _signal_group(leader: int, number: int) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:  # between its fork and its setsid, or gone
        try:
            os.kill(leader, number)
        except ProcessLookupError:
            return


def _popen(module: str, *arguments: str, stdin: int, stdout: int | IO[bytes], stderr: IO[bytes]) -> "subprocess.Popen[bytes]":
    """`python -m module` with this very package, and never with what lies in the working folder."""
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", module, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **package_path()},
        start_new_session=True,  # Ctrl-C is for the main process alone, which then ends its workers in order
    )
