"""What happened in a run, as JSON lines on disk, until it stands in MLflow. A spool exists as long as it is not recorded there.

    <run folder>/tracking/<nanoseconds>-<pid>.jsonl     one attempt: a header, then events, then `end`; meant for the header's `place`
    <run folder>/tracking/recorded.json                 what MLflow holds of the last attempt that was recorded

The writer holds a lock on its open file. The operating system takes it away when the writer dies, however it dies: a reader
that sees the lock free knows that nothing will follow. Whoever records a spool deletes it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.layout import Frozen

FOLDER = "tracking"
POLL = 0.25  # seconds between looks at a spool that is still being written


class Recorded(Frozen):
    """What MLflow holds: the pipeline's run there and `state`, a digest of what was recorded and where."""

    experiment_id: str
    run_id: str
    state: str

    def write(self, run_dir: Path) -> None:
        file = run_dir / FOLDER / "recorded.json"
        temporary = file.with_name(f".{file.name}-{os.getpid()}")  # not store.write_whole: this module lies below the store
        temporary.write_text(self.model_dump_json(indent=1) + "\n")
        temporary.replace(file)

    @classmethod
    def read(cls, run_dir: Path) -> "Recorded | None":
        try:
            return cls.model_validate_json((run_dir / FOLDER / "recorded.json").read_bytes())
        except (OSError, ValidationError):  # never recorded, or by another version: record again
            return None


class SweepEntry(Frozen):
    """What is to be recorded of a sweep: `<sweep folder>/tracking/sweep.json`."""

    name: str  # of its run
    recipe: str
    command: str
    time: float
    exit_code: int
    metrics: dict[str, float]
    note: str  # the ranking, in markdown
    artifacts: tuple[str, ...]  # files of the folder
    view: str  # name of the shared view of its pipelines
    state: str

    def write(self, folder: Path) -> None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / FOLDER / "sweep.json").write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "SweepEntry":
        return cls.model_validate_json((folder / FOLDER / "sweep.json").read_bytes())


class Spool:
    """The writing end. OSError where the run's folder cannot be written."""

    def __init__(self, run_dir: Path, header: Mapping[str, Any]) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        temporary = self.path.with_suffix(".new")
        self._stream = open(temporary, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`: its lock must last
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX)
            self.append(header)
            temporary.rename(self.path)  # a reader never sees it without its lock and header
        except OSError:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it would repeat the flush that failed
                self._stream.close()
            raise

    def append(self, event: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """OSError where the last events cannot be written; closed all the same."""
        self._stream.close()


def spools(run_dir: Path, place: Mapping[str, str] | None = None) -> list[Path]:
    """Attempts that are not recorded yet, oldest first; with `place` only those that are meant for it."""
    found = sorted((run_dir / FOLDER).glob("*.jsonl"))
    return found if place is None else [spool for spool in found if _place(spool) == place]


def _place(spool: Path) -> Any:
    """Where it is to be recorded; None where it was removed meanwhile, is another user's, or lost its header in a power cut."""
    try:
        with open(spool, "rb") as stream:
            return json.loads(stream.readline()).get("place")
    except (OSError, ValueError):
        return None


def is_live(spool: Path) -> bool:
    """Whether its writer still lives; not where it has been recorded and removed meanwhile."""
    try:
        with open(spool, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def follow(spool: Path) -> Iterator[list[dict[str, Any]]]:
    """The events in batches as they come, until `end` or until the writer is gone. A line cut short by its death is dropped."""
    rest = b""
    with open(spool, "rb") as stream:
        while True:
            live = is_live(spool)  # asked before reading, so that a writer's last words are still heard
            *lines, rest = (rest + stream.read()).split(b"\n")
            events = [json.loads(line) for line in lines]
            if events:
                yield events
            if not live or any(event["event"] == "end" for event in events):
                return
            if not events:
                time.sleep(POLL)
