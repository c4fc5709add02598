"""Starts stages in processes of their own, from a server that has torch and transformers imported already.

Importing them takes seconds, forking a process that holds them milliseconds. The server reads one JSON object a line and answers
in kind; `ForkServer` is its client in the main process:

    {"job": "<folder>"}  ->  {"started": 4711}  ...  {"ended": 4711, "status": 0}     (status as in subprocess: -9 is SIGKILL)

Why not multiprocessing: its fork server imports the caller's `__main__` again, and its children outlive a killed parent. Here the
kernel kills the server with the main process and the workers with the server (PR_SET_PDEATHSIG).

Forking is only safe while nothing else runs in the server: where threads live or CUDA is initialised after the preload, and on
other systems than Linux, the server says so and each worker is a fresh interpreter instead.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.library_defaults import set_library_defaults
from pipeline.parent import end_with_parent
from pipeline.worker import run_job

# Modules that almost every stage uses. Not bitsandbytes or llmcompressor: importing bitsandbytes initialises CUDA.
PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
)
# transformers looks whether these are there and then imports them whole, a quarter of all that is imported, for assisted generation and the
# losses of object detection. No stage uses either. A stage that imports them itself finds them, since they are hidden from this look alone.
HIDDEN = ("sklearn", "scipy")


def main() -> None:
    # The protocol gets descriptors of its own: what a library prints while it is imported must not end up in it.
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    parent = int(sys.argv[1])
    end_with_parent(parent)
    reason = preload()
    os.write(answers, _line(mode="spawn" if reason else "fork", reason=reason))
    if not reason:
        _Server(requests, answers).serve()
    os._exit(0)  # nothing to tear down, and a client may be waiting


def preload() -> str:
    """Import PRELOAD. Why this process must not fork afterwards, empty where it may."""
    set_library_defaults()
    try:
        with _hidden(HIDDEN):
            for name in PRELOAD:
                importlib.import_module(name)
    except ImportError as error:
        traceback.print_exc()
        return f"{error.name or 'a library'} cannot be imported ({error})"
    if sys.modules["torch"].cuda.is_initialized():
        return "importing the libraries initialised CUDA"
    if threading.active_count() > 1:
        return "importing the libraries started Python threads"
    gc.collect()
    gc.freeze()  # later collections then leave these objects' pages alone, so that workers go on sharing them
    # BLAS pools stop in their fork handlers and start again on use; what is still there after a fork is there to stay.
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    count = len(os.listdir("/proc/self/task"))
    return f"importing the libraries started {count - 1} native threads" if count > 1 else ""


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Within it these modules are not to be found, unless they are imported already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not to be imported
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _line(**content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


class _Server:
    """One thread, waiting for requests and for children to end. Ends when its client closes the pipe."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers = requests, answers
        self.children: set[int] = set()
        self.wake, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must exist for the descriptor to be written

    def serve(self) -> None:
        waiting = selectors.DefaultSelector()
        waiting.register(self.requests, selectors.EVENT_READ)
        waiting.register(self.wake, selectors.EVENT_READ)
        received = b""
        while True:
            ready = [key.fd for key, _ in waiting.select()]
            if self.wake in ready:
                os.read(self.wake, 4096)
                self._reap()
            if self.requests in ready:
                chunk = os.read(self.requests, 65536)
                if not chunk:
                    break
                *lines, received = (received + chunk).split(b"\n")
                for line in lines:
                    self._start(Path(json.loads(line)["job"]))
        for child in self.children:
            _kill_group(child)

    def _start(self, job: Path) -> None:
        server = os.getpid()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = self._work(job, server)
            except BaseException:  # nothing may reach the server's own frames
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # tearing the interpreter down would take 0.3 s for nothing
        self.children.add(child)
        os.write(self.answers, _line(started=child))

    def _work(self, job: Path, server: int) -> int:
        os.setsid()  # a group of its own: Ctrl-C does not reach it, and what it starts can be ended with it
        end_with_parent(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self.requests, self.answers, self.wake):
            os.close(descriptor)
        log = os.open(job / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed worker's last line is in the log
        return run_job(job)

    def _reap(self) -> None:
        for child in list(self.children):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill_group(child)  # before its pid is free for reuse: processes that the stage left behind
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.children.remove(child)
            os.write(self.answers, _line(ended=child, status=status))


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # it has not called setsid yet
        os.kill(leader, signal.SIGKILL)


if __name__ == "__main__":
    main()
