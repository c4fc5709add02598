"""Small answers that take long to find out, kept from one command to the next beside what they were true of. Example:

    memory = Remembered("stage_code")
    memory.recall("stages.rtn", mark)          # None: nothing is remembered, or it was of another mark
    memory.keep("stages.rtn", mark, answer)    # `mark` and `answer` are JSON values

What is kept is a convenience and never needed: a file that is damaged, of another version or another program's, and a folder that cannot
be written, only cost the time to find the answer again. The folder is `llmpress` in $XDG_CACHE_HOME, or else in ~/.cache. Nothing heavy
is imported here: a TAB is answered from it.
"""

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int, int]  # size, modification time, change time (both in ns), inode

FORM = 1  # of the file; raised where it changes
MOST = 256  # answers in one file, the oldest forgotten first
SETTLED = 2_000_000_000  # ns; a file changed more recently may change again without a new stamp, since clocks of file systems tick


def stamp(file: Path) -> Stamp:
    """The change time, unlike the modification time, cannot be set back by whoever replaces the content."""
    status = os.stat(file)
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def is_settled(found: Stamp) -> bool:
    """Whether any change after now will show in the stamp that the file has now."""
    return time.time_ns() - found[2] > SETTLED


def cache_folder() -> Path:
    """RuntimeError where there is no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "llmpress"


class Remembered:
    """The answers of one kind, by key. Of two processes that keep at once one may lose its answer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def recall(self, key: str, mark: Any) -> Any | None:
        """What was kept for `key`; None where that was with another `mark`."""
        entry = self._read().get(key)
        if not isinstance(entry, list) or len(entry) != 2:
            return None
        text, check = entry
        if not isinstance(text, str) or zlib.crc32(text.encode()) != check:
            return None
        found = json.loads(text)
        return found[1] if found[0] == json.loads(json.dumps(mark)) else None

    def keep(self, key: str, mark: Any, answer: Any) -> None:
        text = json.dumps([mark, answer])
        entries = self._read()
        entries.pop(key, None)
        entries[key] = [text, zlib.crc32(text.encode())]
        for oldest in list(entries)[:-MOST]:
            del entries[oldest]
        self._write(json.dumps({"form": FORM, "entries": entries}))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads((cache_folder() / f"{self.name}.json").read_bytes())
        except (OSError, ValueError, RecursionError, RuntimeError):
            return {}
        entries = content.get("entries") if isinstance(content, dict) and content.get("form") == FORM else None
        return entries if isinstance(entries, dict) else {}

    def _write(self, text: str) -> None:
        """In one step, so that a reader finds the old file or the new one."""
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{self.name}.{os.getpid()}.{time.monotonic_ns()}.tmp"
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(folder / f"{self.name}.json")
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, RuntimeError):  # read-only, full, no home: what is not kept is found out again
            return
