"""What is told of a safetensors file from its bytes, once and in order: its sha256, and which of its tensors hold nan or inf.

Small blocks, so that one is in the core's cache still when it is hashed, and when it is written.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.hashed import Hashed, remember
from pipeline.headers import CheckpointFileError, read_header
from stages.functional.finite import all_finite

BLOCK_BYTES = 1 << 20  # whole numbers of every dtype


class Inspection:
    """Of one file. `damaged` names the tensors that hold nan or inf, in the order of the file."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.damaged: list[str] = []

    def see(self, block: memoryview, name: str = "", dtype: str = "") -> None:
        """The next bytes of the file, which are whole numbers where they are some of a tensor's."""
        self._sha256.update(block)
        if not all_finite(block, dtype) and name not in self.damaged[-1:]:
            self.damaged.append(name)

    def remember(self, file: Path) -> Hashed:
        """Where the file was read or written to its end and is closed."""
        return remember(file, self._sha256.hexdigest(), self.damaged)


def blocks(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def inspect(file: Path) -> Hashed:
    """Read a file that others wrote. CheckpointFileError where it is no whole safetensors file."""
    entries = sorted(read_header(file).items(), key=lambda item: item[1].offset)
    inspection, buffer, end = Inspection(), memoryview(bytearray(BLOCK_BYTES)), file.stat().st_size
    with open(file, "rb", buffering=0) as stream:

        def read(stop: int, name: str = "", dtype: str = "") -> None:
            for start in range(stream.tell(), stop, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, stop - start)]
                fill(block, stream, name)
                inspection.see(block, name, dtype)

        for name, entry in entries:
            read(entry.offset)  # the header, and what lies between tensors
            read(entry.offset + entry.nbytes, name, entry.dtype)
        read(end)
    return inspection.remember(file)


def fill(buffer: memoryview, stream: Any, name: str) -> None:
    """Read until `buffer` is full: one call of read(2) returns at most 2 GiB."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise CheckpointFileError(f"{stream.name} is truncated within {name}; copy it again")
        done += count
