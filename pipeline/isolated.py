"""Calls a function in the interpreter of an isolated backend, and waits for it: the stage's own process on one side of it.

    <job>/isolated/call.json       the function, as `module:name`, its arguments, and the folder it may write to
    <job>/isolated/code/           `pipeline` and `stages`, and nothing else of the environment that llmpress is installed in
    <job>/isolated/response.json   what it returned, or why it did not

Its events and what it prints go where the stage's own go. It shares the stage's process group and memory limit, and dies with it.
The other side is pipeline/isolated_worker.py.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipeline.layout import Frozen
from pipeline.usage import out_of_memory_kills

Kind = Literal["error", "memory", "input", "disk"]
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of the environment that is left


class Call(Frozen):
    function: str
    arguments: dict[str, Any]
    output: Path
    events: Path


class Returned(Frozen):
    """`peak_rss` and `floor_rss`, in bytes, as in a stage's response; the floor is what was resident with the backend imported."""

    ok: Literal[True] = True
    value: dict[str, Any]
    environment: dict[str, str]
    peak_rss: int
    floor_rss: int | None
    peak_vram: int | None


class Failed(Frozen):
    ok: Literal[False] = False
    kind: Kind
    message: str
    peak_rss: int = 0


RETURN: TypeAdapter[Returned | Failed] = TypeAdapter(Returned | Failed)


class IsolatedFailure(Exception):
    """What ended the call, of the same kinds as what ends a stage."""

    def __init__(self, kind: Kind, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Isolated:
    """The interpreter at `python`, called for the job in `job`. `returned` are the calls that came back, in order."""

    def __init__(self, python: Path, job: Path, output: Path) -> None:
        self.python, self.job, self.output = python, job, output
        self.returned: list[Returned] = []

    def __call__(self, function: str, **arguments: Any) -> dict[str, Any]:
        """Call `module:name(ctx, **arguments)` there; JSON values both ways. IsolatedFailure where it did not return."""
        folder = self.job / "isolated"
        code = folder / "code"
        code.mkdir(parents=True, exist_ok=True)
        for package in ("pipeline", "stages"):
            if not (code / package).is_symlink():
                (code / package).symlink_to(Path(__file__).resolve().parent.parent / package)
        (folder / "response.json").unlink(missing_ok=True)
        call = Call(function=function, arguments=arguments, output=self.output, events=self.job / "events.jsonl")
        (folder / "call.json").write_text(call.model_dump_json(indent=1) + "\n", encoding="utf-8")
        kills = out_of_memory_kills()
        command = [str(self.python), "-P", "-u", "-m", "pipeline.isolated_worker", str(folder), str(os.getpid())]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, env=self._environment(code), cwd=folder).returncode  # one writes logs/
        try:
            answer = RETURN.validate_json((folder / "response.json").read_bytes())
        except FileNotFoundError:
            raise _killed(self.python, status, out_of_memory_kills() > kills) from None
        if isinstance(answer, Failed):
            raise IsolatedFailure(answer.kind, answer.message)
        self.returned.append(answer)
        return answer.value

    def _environment(self, code: Path) -> dict[str, str]:
        """The process's own, with the other interpreter's programs first and nothing of this one's packages."""
        kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        path = os.pathsep.join(filter(None, (str(self.python.parent), kept.get("PATH"))))
        return kept | {"PATH": path, "PYTHONPATH": str(code), "PYTHONNOUSERSITE": "1"}


def _killed(python: Path, status: int, oom: bool) -> IsolatedFailure:
    if oom and status == -signal.SIGKILL:
        return IsolatedFailure("memory", "the system's out-of-memory killer ended the backend's interpreter")
    how = f"was killed by signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"ended with exit status {status}"
    return IsolatedFailure("error", f"the backend's interpreter {python} {how} and without a result")
