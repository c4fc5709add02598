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

MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises CheckpointFileError where the file is truncated or is not safetensors."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointFileError(f"{file} is truncated or is not a safetensors file; copy it again")
        try:
            table = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointFileError(f"{file} has an unreadable safetensors header; copy it again") from None
    entries, end = {}, 0
    for name, row in table.items():
        if name == "__metadata__":
            continue
        if row["dtype"] not in ITEM_BYTES:
            raise CheckpointFileError(f"{file}: tensor {name} has dtype {row['dtype']}, which is not supported")
        begin, stop = row["data_offsets"]
        entries[name] = TensorEntry(row["dtype"], tuple(row["shape"]), file, 8 + length + begin)
        if entries[name].nbytes != stop - begin:
            raise CheckpointFileError(f"{file}: tensor {name} does not fill its place in the file; copy it again")
        end = max(end, 8 + length + stop)
    if size < end:
        raise CheckpointFileError(f"{file} is truncated: {size:,} bytes, its header needs {end:,}; copy it again")
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the checkpoint: those the index names, else `model.safetensors`.

    A repository may carry a second, consolidated copy beside the shards, so other *.safetensors files are not read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise CheckpointFileError(f"{index} is not a safetensors index; copy it again") from None
        files = [folder / Path(name).name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointFileError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; convert it to safetensors first"
        )
    raise CheckpointFileError(f"{folder} lacks {', '.join(missing)}; a checkpoint needs its safetensors files")


def tensor_table(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a (sharded) checkpoint folder by name, in file order."""
    table: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        table |= read_header(file)
    return table
