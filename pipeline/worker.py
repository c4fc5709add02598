"""The child process of one stage: `request.json` in, `response.json` out, in a folder of its own.

    request.json    what to run, on which artifacts, where to (written by the executor before the start)
    events.jsonl    progress, curves and notes, one JSON object a line, appended while the stage runs
    log.txt         everything printed, tracebacks included
    response.json   written last and by one rename: its absence means that the process was killed

The folder is the whole protocol, so it does not matter who started the process: the fork server, `python -m pipeline.worker
<folder>`, or the interpreter of an isolated backend. Needs only pydantic until the stage imports what it uses.
"""

import errno
import faulthandler
import json
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import TypeAdapter

from pipeline.artifact import TYPES, Artifact, Checkpoint, FileRecord
from pipeline.artifact_spec import Spec
from pipeline.hashed import Hashed, known_below, remember_links
from pipeline.isolated import Isolated, IsolatedFailure, Kind, Returned
from pipeline.layout import Frozen
from pipeline.library_defaults import set_library_defaults
from pipeline.parent import end_with_parent
from pipeline.spec import ModelSpec
from pipeline.stage import Context, find_stage
from pipeline.usage import environment, peak_rss, peak_vram, resident

PROGRESS_INTERVAL = 0.1  # seconds between two progress events of the same label
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
DISK_FULL = ("no space left on device", "disk quota exceeded")

EXIT_CODES: dict[Kind, int] = {"error": 1, "input": 2, "memory": 3, "disk": 4}  # a full disk may leave no response.json to read


class InputArtifact(Frozen):
    """`files` are recorded in the store, by name below `path`; a source has none."""

    type: str
    path: Path
    key: str
    spec: Spec
    files: dict[str, FileRecord] = {}


class Request(Frozen):
    """One execution. `inputs` holds every port of `run`, None where nothing is wired; paths are absolute."""

    node: str
    stage: str
    params: dict[str, Any]
    execution: dict[str, Any]
    key: str
    output: Path
    inputs: dict[str, InputArtifact | None]
    expected: dict[str, Spec]  # by output port, as the plan inferred them
    types: dict[str, str]  # by output port, names of artifact types
    interpreter: Path | None = None  # of the isolated backend that the stage calls; None: it calls none


class OutputArtifact(Frozen):
    type: str
    path: str  # relative to the request's output
    metrics: dict[str, float]


class Success(Frozen):
    """`files` are those of the output, by name in it, that were hashed as they were written, checked or linked; what other processes
    of the stage wrote is not among them. `seconds` includes the guard. Memory is in bytes: `peak_rss` counts pages shared with the fork
    server, `floor_rss` is what was resident before the stage's `run` began, `peak_vram` what torch reserved on all GPUs. None: the
    system does not say; no GPU was used.
    """

    ok: Literal[True] = True
    outputs: dict[str, OutputArtifact]
    files: dict[str, Hashed] = {}
    seconds: float
    peak_rss: int
    floor_rss: int | None
    peak_vram: int | None
    environment: dict[str, str]


class Failure(Frozen):
    """`message` is one sentence; the traceback is in the log."""

    ok: Literal[False] = False
    kind: Kind
    message: str
    peak_rss: int = 0


RESPONSE: TypeAdapter[Success | Failure] = TypeAdapter(Success | Failure)


class EventLog:
    """Appends events to `events.jsonl`, each flushed, progress thinned so that a stage may report every item."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._label, self._next = "", 0.0

    def emit(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress" and self._too_soon(event):
            return
        self.stream.write(json.dumps({"time": time.time(), **event}, default=float) + "\n")  # float: numpy and torch scalars
        self.stream.flush()

    def _too_soon(self, event: dict[str, Any]) -> bool:
        now = time.monotonic()
        if event["label"] == self._label and now < self._next and event["done"] < event["total"]:
            return True
        self._label, self._next = event["label"], now + PROGRESS_INTERVAL
        return False


def run_job(folder: Path) -> int:
    """Run the job of `folder` in this process and write its response. Returns the exit code."""
    faulthandler.enable()  # a crash in native code leaves its Python stack in the log
    started = time.monotonic()
    response: Success | Failure
    try:
        request = Request.model_validate_json((folder / "request.json").read_bytes())
        with open(folder / "events.jsonl", "a", encoding="utf-8") as stream:
            isolated = Isolated(request.interpreter, folder, request.output) if request.interpreter else None
            outputs, floor = _execute(request, EventLog(stream), isolated)
        files = known_below(request.output)
        response = _success(outputs, files, time.monotonic() - started, floor, isolated.returned if isolated else [])
        code = 0
    except BaseException as error:  # sys.exit() in a stage too: whatever ended it must become a sentence
        _limit_memory(None)  # so that memory is left to say so
        traceback.print_exc()
        kind, message = explain(error)
        response = Failure(kind=kind, message=message, peak_rss=peak_rss())
        code = EXIT_CODES[kind]
    try:
        temporary = folder / "response.tmp"
        temporary.write_text(response.model_dump_json())
        temporary.rename(folder / "response.json")
    except OSError:  # the disk is full: the exit code has to do
        traceback.print_exc()
        code = code or EXIT_CODES["disk"]
    return code


def _success(
    outputs: dict[str, OutputArtifact], files: dict[str, Hashed], seconds: float, floor: int | None, calls: list[Returned]
) -> Success:
    """With the memory of whichever took more beyond its libraries: this process, or the isolated interpreter that it waited for."""
    own = (peak_rss(), floor, peak_vram())
    used = [own, *((call.peak_rss, call.floor_rss, call.peak_vram) for call in calls)]
    peak, base, vram = max(used, key=lambda memory: memory[0] - (memory[1] or 0))
    isolated = {f"isolated.{name}": value for call in calls for name, value in call.environment.items()}
    return Success(
        outputs=outputs,
        files=files,
        seconds=seconds,
        peak_rss=peak,
        floor_rss=base,
        peak_vram=vram,
        environment=environment() | isolated,
    )


def _execute(request: Request, log: EventLog, isolated: Isolated | None) -> tuple[dict[str, OutputArtifact], int | None]:
    """What the stage made, by output port, and the bytes that were resident before it began."""
    stage = find_stage(request.stage).from_dict(request.params, request.execution)
    _limit_memory(stage.execution.memory_limit)
    inputs = {
        port: TYPES[given.type](given.path, given.spec, given.key) if given else None  # None: not wired, or unused by these params
        for port, given in request.inputs.items()
    }
    floor = resident()
    made = _by_port(request, stage.run(Context(request.output, log.emit, isolated), **inputs))
    published = [(given.path / name, record) for given in request.inputs.values() if given for name, record in given.files.items()]
    remember_links(request.output, ((file, record.nbytes, record.sha256) for file, record in published))
    found = {port: _guard(artifact, request.expected[port]) for port, artifact in made.items() if isinstance(artifact, Checkpoint)}
    outputs = {
        port: OutputArtifact(
            type=type(artifact).__name__,
            path=artifact.path.relative_to(request.output).as_posix(),
            metrics=dict(artifact.metrics) | found.get(port, {}),
        )
        for port, artifact in made.items()
    }
    return outputs, floor


def _by_port(request: Request, made: Any) -> dict[str, Artifact]:
    """What `run` returned, by output port. TypeError where that is not what the plan says of the stage."""
    single = len(request.types) == 1
    artifacts = {}
    for port, name in request.types.items():
        artifact = made if single else getattr(made, port, None)
        if not isinstance(artifact, TYPES[name]):
            raise TypeError(f"{request.stage}.run returned {type(artifact).__name__} as {port}; the plan says {name}")
        place = request.output if single else request.output / port
        if artifact.path != place:
            raise TypeError(f"{request.stage}.run returned {artifact.path} as {port}; its place is {place}")
        artifacts[port] = artifact
    return artifacts


def _guard(checkpoint: Checkpoint, expected: Spec) -> dict[str, float]:
    """What was measured on the way."""
    from stages.runtime.guard import check_checkpoint  # here, because it imports torch, which not every stage needs

    assert isinstance(expected, ModelSpec), "a checkpoint's spec is a ModelSpec"
    return check_checkpoint(checkpoint.path, expected)


def explain(error: BaseException) -> tuple[Kind, str]:
    """What ended a stage, as a kind and one sentence. Causes count: libraries wrap a failed allocation in errors of their own."""
    sentence = " ".join(str(error).split())
    if isinstance(error, IsolatedFailure):
        return error.kind, sentence
    for cause in _causes(error):
        text = str(cause).lower()
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError | OSError) and any(s in text for s in OUT_OF_MEMORY)):
            return "memory", sentence or type(error).__name__
        # safetensors and torch report a failed write as exceptions of their own, with the system's text in them
        if (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)) or any(s in text for s in DISK_FULL):
            return "disk", sentence
    if isinstance(error, ValueError) and sentence:
        return "input", sentence
    first_line = str(error).strip().partition("\n")[0]
    return "error", f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _limit_memory(nbytes: int | None) -> None:
    """Bound private writable memory; None lifts it. Not RLIMIT_AS, which also counts files mapped to read, such as weights."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard if nbytes is None else nbytes, hard))


def main() -> int:
    """`python -m pipeline.worker <folder> [<pid of the parent that it must not outlive>]`"""
    if len(sys.argv) > 2:
        end_with_parent(int(sys.argv[2]))
    set_library_defaults()
    return run_job(Path(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
