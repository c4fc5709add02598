"""The tensor table of a safetensors checkpoint, read from file headers alone: names, dtypes, shapes, places.

No weight is read and no array library is imported, so a plan can know a 140 GB folder in milliseconds. The format
(safetensors, "Format" section of its README): 8 bytes little-endian header length, that many bytes of JSON
{name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


class CheckpointFileError(ValueError):
    """A folder that is no readable safetensors checkpoint; the message says why and what to do."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk: `dtype` is the format's own name (`BF16`), `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a checkpoint's file holds. CheckpointFileError where it holds anything else; OSError where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # RecursionError: brackets nested deeper than any real file's
        raise CheckpointFileError(f"{file} is not JSON; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{file} is not a JSON object; copy it again")
    return content


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises CheckpointFileError where the file is truncated or is not safetensors."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointFileError(f"{file} is truncated or is not a safetensors file; copy it again")
        try:
            table = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            table = None
    if not isinstance(table, dict):
        raise CheckpointFileError(f"{file} has an unreadable safetensors header; copy it again")
    entries, end = {}, 0
    for name, row in table.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, stop = _read_row(file, name, row)
        entries[name] = TensorEntry(dtype, shape, file, 8 + length + begin)
        if entries[name].nbytes != stop - begin:
            raise CheckpointFileError(f"{file}: tensor {name} does not fill its place in the file; copy it again")
        end = max(end, 8 + length + stop)
    if size < end:
        raise CheckpointFileError(f"{file} is truncated: {size:,} bytes, its header needs {end:,}; copy it again")
    return entries


def _read_row(file: Path, name: str, row: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, stop) of a header's row: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}."""
    match row:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, stop]}:
            if all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
                if dtype not in ITEM_BYTES:
                    raise CheckpointFileError(f"{file}: tensor {name} has dtype {dtype}, which is not supported")
                return dtype, tuple(shape), begin, stop
    raise CheckpointFileError(f"{file}: tensor {name} has no dtype, shape and data_offsets in the header; copy it again")


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the checkpoint, as transformers chooses them: `model.safetensors`, else those the index names.

    A repository may carry a second, consolidated copy beside the shards, so other *.safetensors files are not read.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    names = [single.name] if single.is_file() or not index.is_file() else _indexed_names(index)
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointFileError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; convert it to safetensors first"
        )
    raise CheckpointFileError(f"{folder} lacks {', '.join(missing)}; a checkpoint needs its safetensors files")


def _indexed_names(index: Path) -> list[str]:
    """The file names in an index's `weight_map`, which may not lead out of its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointFileError(f"{index} is not a safetensors index; copy it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name or name == "..":
            raise CheckpointFileError(f"{index} names {name!r}, which is not a file of its folder; put all shards into one folder")
    return names


def tensor_table(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a (sharded) checkpoint folder by name, in file order."""
    table: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        table |= read_header(file)
    return table
