"""One job as the main process sees it: its folder written, its worker watched, its end told in one sentence.

An end is one of: a response (success, or a failure that the worker could still describe), a signal, an exit without a response,
or an interruption here. Whatever it is, no process is left when `run_job` returns or raises.
"""

import contextlib
import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import StageFailed, StoreError
from pipeline.process import ForkServer, Worker, kill
from pipeline.store import explain_os_error
from pipeline.target import format_size
from pipeline.usage import out_of_memory_kills, parse_peak_rss
from pipeline.worker import EXIT_CODES, RESPONSE, Failure, Request, Success

POLL = 0.1  # seconds between two looks at a worker's events and memory; its end is noticed at once
TAIL_LINES, TAIL_WIDTH = 15, 240
Emit = Callable[[dict[str, Any]], None]


def run_job(server: ForkServer, request: Request, folder: Path, planned: int, emit: Emit) -> Success:
    """Run one stage in a process of its own. `planned` is its peak in bytes as the plan has it, for the message.

    Raises StageFailed, StoreError where the disk is full, and whatever interrupts it (KeyboardInterrupt) after ending the worker.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(request.model_dump_json(indent=1) + "\n")
    kills_before = out_of_memory_kills()
    worker = server.run(folder)
    watch = _Watch(worker, folder, emit)
    try:
        watch.look()
        while worker.wait(POLL) is None:
            watch.look()
    finally:
        if worker.returncode is None:
            kill(worker)
    watch.look()
    response = _read_response(folder)
    if isinstance(response, Success) and worker.returncode == 0:
        return response
    peak = max(watch.peak_rss, response.peak_rss if response else 0)
    if (response.kind if isinstance(response, Failure) else "") == "disk" or worker.returncode == EXIT_CODES["disk"]:
        full = OSError(errno.ENOSPC, "No space left on device")
        raise StoreError(f"{request.node}: {explain_os_error(full, request.output)}")
    reason = _reason(request, response, worker.returncode, planned, peak, out_of_memory_kills() > kills_before)
    log = folder / "log.txt"
    raise StageFailed(request.node, reason, key=request.key, log=str(log), tail=_tail(log))


class _Watch:
    """Follows a worker's events and the peak of its memory. A killed worker cannot tell how much it had."""

    def __init__(self, worker: Worker, folder: Path, emit: Emit) -> None:
        self.worker, self.emit = worker, emit
        self.events = folder / "events.jsonl"
        self.position = 0
        self.peak_rss = 0

    def look(self) -> None:
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc here
            self.peak_rss = max(self.peak_rss, parse_peak_rss(Path(f"/proc/{self.worker.pid}/status").read_text()))
        if not self.events.exists():
            return
        with open(self.events, "rb") as stream:
            stream.seek(self.position)
            content = stream.read()
        whole = content.rpartition(b"\n")[0]  # the last line may be half written
        self.position += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            self.emit(json.loads(line))


def _read_response(folder: Path) -> Success | Failure | None:
    try:
        return RESPONSE.validate_json((folder / "response.json").read_bytes())
    except FileNotFoundError:
        return None


def _reason(request: Request, response: Success | Failure | None, code: int | None, planned: int, peak: int, oom: bool) -> str:
    """Why a job that did not succeed ended, in one sentence."""
    limit = request.execution.get("memory_limit")
    memory = f"planned peak {format_size(planned)}{f', limit {format_size(limit)}' if limit else ''}, used at least {format_size(peak)}"
    if isinstance(response, Failure):
        return f"ran out of memory: {memory} ({response.message})" if response.kind == "memory" else response.message
    if code == -signal.SIGKILL:
        if oom:
            return f"ran out of memory: {memory} when the system's out-of-memory killer ended it"
        return f"was killed by signal 9 (SIGKILL): {memory}; the system reports no lack of memory, so a person or a job limit ended it"
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    if code == EXIT_CODES["memory"]:
        return f"ran out of memory: {memory}"
    return f"ended with exit status {code} and without a result"


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, log.stat().st_size - 16384))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(line[:TAIL_WIDTH] for line in lines[-TAIL_LINES:])
