"""The header of a GGUF file: its metadata and its tensor table, read without numpy and without touching a weight.

The format (docs/gguf.md of ggml, version 3, little-endian): `GGUF`, version, number of tensors, number of metadata entries; the entries,
each a key, a type and a value; the tensors, each a name, its dimensions (the fastest first), a type and an offset; then, from the next
multiple of `general.alignment` on, the data.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.ggml import TYPE_NUMBERS, tensor_bytes
from pipeline.headers import CheckpointFileError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # where the file does not say
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type -> struct's code
STRING, ARRAY = 8, 9
TYPE_NAMES = {number: name for name, number in TYPE_NUMBERS.items()}


@dataclass(frozen=True)
class GGUFTensor:
    """`type` is llama.cpp's name (`Q4_K`), `shape` has the fastest dimension last, `offset` counts from the start of the file."""

    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, padding between them not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_gguf(file: Path) -> GGUFHeader:
    """CheckpointFileError where the file is no GGUF, is cut short, or holds a tensor type that is not known here."""
    with open(file, "rb") as stream:
        if stream.read(4) != MAGIC:
            raise CheckpointFileError(f"{file} is not a GGUF file; give one that llama.cpp reads")
        try:
            header = _read(stream, file)
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
            raise CheckpointFileError(f"{file} has an unreadable GGUF header; copy it again") from None
    end = max((tensor.offset + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if os.path.getsize(file) < end:
        raise CheckpointFileError(f"{file} is truncated: {os.path.getsize(file):,} bytes, its header needs {end:,}; copy it again")
    return header


def _read(stream: BinaryIO, file: Path) -> GGUFHeader:
    version = _scalar(stream, "I")
    if version not in VERSIONS:
        raise CheckpointFileError(f"{file} is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
    count, entries = _scalar(stream, "Q"), _scalar(stream, "Q")
    metadata = {}
    for _ in range(entries):
        key = _string(stream)
        metadata[key] = _value(stream, _scalar(stream, "I"))
    rows = [_tensor(stream, file) for _ in range(count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = math.ceil(stream.tell() / alignment) * alignment
    return GGUFHeader(metadata, {name: GGUFTensor(kind, shape, start + offset) for name, kind, shape, offset in rows})


def _tensor(stream: BinaryIO, file: Path) -> tuple[str, str, tuple[int, ...], int]:
    name, dimensions = _string(stream), _scalar(stream, "I")
    shape = tuple(reversed([_scalar(stream, "Q") for _ in range(dimensions)]))
    number, offset = _scalar(stream, "I"), _scalar(stream, "Q")
    if number not in TYPE_NAMES:
        raise CheckpointFileError(f"{file}: tensor {name} has type {number}; there are: {', '.join(TYPE_NUMBERS)}")
    return name, TYPE_NAMES[number], shape, offset


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(stream)
    if kind == ARRAY:
        inner, count = _scalar(stream, "I"), _scalar(stream, "Q")
        if inner in SCALARS:
            return list(_unpack(stream, f"<{count}{SCALARS[inner]}"))
        return [_value(stream, inner) for _ in range(count)]
    if kind not in SCALARS:
        raise struct.error(f"value type {kind}")
    return _scalar(stream, SCALARS[kind])


def _scalar(stream: BinaryIO, code: str) -> Any:
    return _unpack(stream, f"<{code}")[0]


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _string(stream: BinaryIO) -> str:
    """Token texts may be cut through a character, so that not all of them are UTF-8."""
    length = _scalar(stream, "Q")
    content = stream.read(length)
    if len(content) < length:
        raise struct.error("string is cut short")
    return content.decode("utf-8", "surrogateescape")
