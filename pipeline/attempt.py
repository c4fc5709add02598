"""What an interrupted attempt of a stage left behind, and whether the next one may continue it.

    scratch/<key12>/       its files
    scratch/<key12>.json   which code wrote them, and how often they were continued

The key stands for parameters, inputs and library versions. A stage that `resumes` therefore finds its files again unless its own
code has changed since; then it starts again and says so. Execution settings may differ: they never change a result, and whoever
ran out of memory after hours continues with a smaller micro batch. What a stage that does not resume left is removed.
"""

from pathlib import Path

from pipeline.artifact import MANIFEST
from pipeline.layout import Frozen
from pipeline.stage import Stage
from pipeline.stage_code import fingerprint
from pipeline.store import Store, write_whole


class Record(Frozen):
    """The content of `<key12>.json`."""

    fingerprint: str
    resumes: int = 0


class Attempt:
    """One execution's scratch folder, ready to be worked in by a caller that holds the key's lock."""

    def __init__(self, store: Store, stage: Stage, key: str) -> None:
        self.file = store.attempt(key)
        self.code = fingerprint(type(stage).__module__)
        before = _read(self.file)
        has_files = any(store.scratch(key).iterdir())
        self.note = ""  # why what an attempt had done is lost
        if stage.resumes and has_files and (before is None or before.fingerprint != self.code):
            self.note = f"an interrupted attempt is not continued, because the code of {stage.name} has changed since; it starts again"
        if self.note or not stage.resumes or not has_files:
            store.discard(key)
            before = None
        self.resumes = before.resumes if before else 0
        self.folder = store.scratch(key).resolve()
        self._make_writable()
        if stage.resumes:
            self._save()

    def resumed(self) -> None:
        """The stage has found its files and goes on."""
        self.resumes += 1
        self._save()

    def _save(self) -> None:
        write_whole(self.file, Record(fingerprint=self.code, resumes=self.resumes).model_dump_json() + "\n")

    def _make_writable(self) -> None:
        """After an attempt that was killed while it published."""
        for name in (MANIFEST, "artifact.tmp"):
            (self.folder / name).unlink(missing_ok=True)
        for file in self.folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)


def _read(file: Path) -> Record | None:
    try:
        return Record.model_validate_json(file.read_bytes())
    except (OSError, ValueError):  # absent, or cut short: then nobody knows who wrote the files
        return None
