"""Read and write safetensors checkpoints tensor by tensor, holding neither a model nor a shard.

Reading is `readinto` a buffer and not a memory map: a map's file pages count as the process's memory for as long as any
view of them lives, and a view that outlives its file keeps the whole map. Writing streams: the room for a shard's header
is reserved first (the format pads headers with spaces), the data follows as it comes, the header is filled in last. So a
file that was cut short has an empty header and no reader takes it for a checkpoint.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from pipeline.companions import companion_files
from pipeline.headers import CheckpointFileError, TensorEntry, tensor_table

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 5 * 10**9
HEADER_ROOM = 1 << 16  # a shard's data begins here, on a page boundary; about 450 tensors fit in its header
COPY_BYTES = 4 << 20  # a plain copy goes through a buffer of this size


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The storage of a contiguous CPU tensor, without a copy (numpy has no bf16, hence by way of uint8)."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class TensorReader:
    """The tensors of a checkpoint folder. `table` knows all of them; `read` brings one into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[str, TensorEntry] = tensor_table(folder)

    def entry(self, name: str) -> TensorEntry:
        if name not in self.table:
            raise CheckpointFileError(f"{self.folder} has no tensor {name}; its config.json describes another model")
        return self.table[name]

    def read(self, name: str, rows: tuple[int, int] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, or its rows [first, last) along dimension 0 (cut at its end).

        `out` is a contiguous tensor of the result's dtype and shape to read into instead of fresh memory.
        CheckpointFileError (a ValueError) where there is no such tensor or the file ends early.
        """
        entry = self.entry(name)
        shape, offset = list(entry.shape), entry.offset
        if rows is not None:
            first, last = rows[0], min(rows[1], shape[0])
            offset += first * (entry.nbytes // shape[0])
            shape[0] = last - first
        if out is None:
            out = torch.empty(shape, dtype=DTYPES[entry.dtype])
        assert list(out.shape) == shape and out.dtype == DTYPES[entry.dtype] and out.is_contiguous(), f"{name}: wrong buffer"
        if out.numel():
            with open(entry.file, "rb", buffering=0) as stream:
                stream.seek(offset)
                fill(as_bytes(out), stream, name)
        return out


def fill(buffer: memoryview, stream: Any, name: str) -> None:
    """Read until `buffer` is full: one call of read(2) returns at most 2 GiB."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise CheckpointFileError(f"{stream.name} is truncated within {name}; copy it again")
        done += count


class CheckpointWriter:
    """Write a checkpoint's tensors in the order they come; a context manager.

    One shard becomes `model.safetensors`; several become `model-00001-of-0000N.safetensors` with an index. Leaving the
    context by an exception leaves only `*.partial` files, which the next writer of the folder removes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, dict[str, Any]]] = []  # the header of each shard
        self.stream: BinaryIO | None = None
        self.header_bytes = self.data_bytes = 0  # of the open shard

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("model*.safetensors"), *self.folder.glob("shard-*.partial"), self._index):
            stale.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            if self.stream is not None:
                self.stream.close()
            return
        if not self.shards:
            self._open_shard()
        self._close_shard()
        self._publish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Memory beyond the tensor is used only where it is not contiguous."""
        tensor = tensor.detach().contiguous()
        stream = self._place(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes)
        if tensor.numel():
            write_all(stream, as_bytes(tensor))

    def copy(self, name: str, reader: TensorReader, source: str | None = None) -> None:
        """Write the tensor `source` (default: of the same name) of another checkpoint, through one small buffer."""
        entry = reader.entry(source or name)
        target = self._place(name, entry.dtype, list(entry.shape), entry.nbytes)
        buffer = memoryview(bytearray(min(COPY_BYTES, entry.nbytes)))
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.nbytes, COPY_BYTES):
                part = buffer[: min(COPY_BYTES, entry.nbytes - start)]
                fill(part, stream, name)
                write_all(target, part)

    def _place(self, name: str, dtype: str, shape: list[int], nbytes: int) -> BinaryIO:
        """Enter a tensor into the open shard's header, or a new shard's, and return the file to write its data to."""
        assert all(name not in shard for shard in self.shards), f"{name} was written before"
        row = {"dtype": dtype, "shape": shape, "data_offsets": [self.data_bytes, self.data_bytes + nbytes]}
        room = len(json.dumps({name: row})) + 32  # offsets in another shard are never longer than that
        full = self.data_bytes > 0 and self.data_bytes + nbytes > self.shard_bytes
        if self.stream is None or full or self.header_bytes + room > HEADER_ROOM - 8:
            self._open_shard()
            row["data_offsets"] = [0, nbytes]
        assert self.stream is not None
        self.shards[-1][name] = row
        self.header_bytes += room
        self.data_bytes += nbytes
        return self.stream

    def _open_shard(self) -> None:
        if self.stream is not None:
            self._close_shard()
        self.shards.append({})
        self.stream = open(self._partial(len(self.shards)), "wb", buffering=0)  # noqa: SIM115 (closed by _close_shard or __exit__)
        self.stream.seek(HEADER_ROOM)
        self.header_bytes, self.data_bytes = 64, 0  # 64: braces and the metadata entry

    def _close_shard(self) -> None:
        """Fill in the header: its length, the JSON, and spaces up to the data."""
        assert self.stream is not None
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.shards[-1]}).encode().ljust(HEADER_ROOM - 8)
        assert len(header) == HEADER_ROOM - 8, "the header outgrew its room"
        self.stream.seek(0)
        write_all(self.stream, memoryview(len(header).to_bytes(8, "little") + header))
        self.stream.close()
        self.stream = None

    def _publish(self) -> None:
        """Give the shards their names, which hold their number, and write the index where there are several."""
        count = len(self.shards)
        if count == 1:
            self._partial(1).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self.shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(row["data_offsets"][1] - row["data_offsets"][0] for shard in self.shards for row in shard.values())
        self._index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")

    @property
    def _index(self) -> Path:
        return self.folder / "model.safetensors.index.json"

    def _partial(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.partial"


def write_all(stream: BinaryIO, data: memoryview) -> None:
    """Write until all of it is written: one call of write(2) takes at most 2 GiB."""
    done = 0
    while done < len(data):
        done += stream.write(data[done:])


def copy_companions(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Complete a checkpoint folder: write `config` as its config.json, copy generation_config.json and the tokenizer's files.

    Nothing else is copied: no code, no weights, no licence file that might no longer hold.
    """
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
