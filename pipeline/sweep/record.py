"""What is kept of each job of a sweep, `<sweep folder>/jobs/<digest12>.json`, by whichever process runs it.

A record is written when its job starts and again when it ends, so that a job whose process was killed is known by a record without
an exit code. It is named after the recipe's digest, not after the job's number: the same command again finds its own.
"""

import contextlib
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import StoreError
from pipeline.identity import digest
from pipeline.layout import Frozen
from pipeline.store import SHORT, explain_os_error, write_whole

JOBS = "jobs"  # below the sweep's folder


class JobRecord(Frozen):
    """One job. Paths are absolute."""

    digest: str  # of the recipe; of the overrides where it could not be planned
    overrides: tuple[str, ...]  # the job's own, `recipe=...` included
    name: str = ""  # `prune>distill>rtn4`; empty where it could not be planned
    run_dir: str = ""  # holds report.json; empty where it did not get that far
    exit_code: int | None = None  # None: it never ended, or is not over
    error: str = ""  # sentences, one a line; empty where it ended well
    started: float = 0.0  # seconds since the epoch
    seconds: float = 0.0


class Sweep(Frozen):
    """The jobs that one command ran."""

    folder: Path
    command: str  # as it was typed
    jobs: tuple[JobRecord, ...]
    problem: str = ""  # what ended the sweep before its last job


class RunningJob:
    """Keeps the record of a job up to date. `label` stands before its lines where several jobs print at the same time.

    StoreError where the folder cannot be written.
    """

    def __init__(self, folder: Path, overrides: tuple[str, ...], label: str = "") -> None:
        self.folder, self.label = folder, label
        self.record = JobRecord(digest=digest("overrides", list(overrides)), overrides=overrides, started=time.time())
        self._started = time.monotonic()
        self._write()

    def planned(self, recipe_digest: str, name: str, run_dir: Path) -> None:
        """What it is going to do is known now."""
        before = self._file()
        self.record = self.record.model_copy(update={"digest": recipe_digest, "name": name, "run_dir": str(run_dir)})
        self._write()
        before.unlink(missing_ok=True)

    def ended(self, exit_code: int, error: str = "") -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self.record = self.record.model_copy(update={"exit_code": exit_code, "error": error, "seconds": seconds})
        try:
            self._write()
        except StoreError as problem:  # a full disk, of which the job's own error speaks already
            print(f"warning: {problem}", file=sys.stderr)

    def _file(self) -> Path:
        return self.folder / JOBS / f"{self.record.digest[:SHORT]}.json"

    def _write(self) -> None:
        file = self._file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, self.record.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise StoreError(explain_os_error(error, self.folder)) from None


def forget_jobs(folder: Path) -> None:
    """Before a command starts its jobs: what an earlier one left of its own is no longer true."""
    for file in (folder / JOBS).glob("*.json"):
        file.unlink(missing_ok=True)


def read_jobs(folder: Path) -> tuple[JobRecord, ...]:
    """In the order in which they began. A file that is something else is passed over."""
    found = []
    for file in (folder / JOBS).glob("*.json"):
        with contextlib.suppress(OSError, ValidationError):
            found.append(JobRecord.model_validate_json(file.read_bytes()))
    return tuple(sorted(found, key=lambda record: record.started))
