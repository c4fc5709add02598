"""Read and write safetensors checkpoints tensor by tensor, holding neither a model nor a shard.

Reading is `readinto` a buffer and not a memory map: a map's file pages count as the process's memory for as long as any
view of them lives, and a view that outlives its file keeps the whole map. Writing streams: what will be written is known from a
model's spec before its first weight, so a shard's header comes first, and all of the file passes by in order, once, to be hashed.
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from pipeline.companions import companion_files
from pipeline.headers import ITEM_BYTES, CheckpointFileError, TensorEntry, tensor_table
from stages.runtime.inspection import BLOCK_BYTES, Inspection, blocks, fill

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SHARD_BYTES = 5 * 10**9
PAGE = 4096  # a shard's data begins on a page boundary
UNPLANNED = "the checkpoint is not what was planned: "


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


class CheckpointWriter:
    """Write the tensors of a checkpoint, (dtype, shape) by name, in their order; a context manager.

    One shard becomes `model.safetensors`; several become `model-00001-of-0000N.safetensors` with an index. Each is hashed, and
    searched for nan and inf, as it is written, so that nobody reads it for that again. Leaving the context by an exception leaves
    only `*.partial` files, which the next writer of the folder removes. ValueError where another tensor comes than was announced.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shards = split_into_shards(tensors, shard_bytes)
        self._coming = deque((number, name) for number, shard in enumerate(self.shards) for name in shard)
        self._written: list[Inspection] = []  # of the shards begun so far
        self._stream: BinaryIO | None = None  # of the last of them

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("model*.safetensors"), *self.folder.glob("shard-*.partial"), self._index):
            stale.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and not self._written:  # a checkpoint of no tensors
            self._open_shard()
        if self._stream is not None:
            self._stream.close()
        if kind is not None:
            return
        if self._coming:
            raise ValueError(f"{UNPLANNED}{self._coming[0][1]} is missing")
        self._publish()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Memory beyond the tensor is used only where it is not contiguous."""
        self.add_rows(name, DTYPE_NAMES[tensor.dtype], tensor.shape, [tensor])

    def add_rows(self, name: str, dtype: str, shape: Sequence[int], parts: Iterable[torch.Tensor]) -> None:
        """Write one tensor, some rows after the other; a part's memory may be used again when the next one is asked for."""
        self._expect(name, dtype, shape)
        nbytes = 0
        for part in parts:
            assert DTYPE_NAMES[part.dtype] == dtype, f"{name}: rows of {part.dtype}"
            nbytes += part.nbytes
            for block in blocks(as_bytes(part.detach().contiguous())) if part.numel() else ():
                self._write(block, name, dtype)
        assert nbytes == math.prod(shape) * ITEM_BYTES[dtype], f"{name}: {nbytes:,} bytes are not {list(shape)}"

    def copy(self, name: str, reader: TensorReader, source: str | None = None) -> None:
        """Write the tensor `source` (default: of the same name) of another checkpoint, through one small buffer."""
        entry = reader.entry(source or name)
        self._expect(name, entry.dtype, entry.shape)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, entry.nbytes)))
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(entry.offset)
            for start in range(0, entry.nbytes, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, entry.nbytes - start)]
                fill(block, stream, name)
                self._write(block, name, entry.dtype)

    def _expect(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """ValueError unless that tensor is the next one; its file is open then."""
        number, planned = self._coming[0] if self._coming else (0, None)
        if name != planned:
            raise ValueError(f"{UNPLANNED}{name} comes where {planned or 'nothing more'} is expected")
        row = self.shards[number][name]
        if (dtype, list(shape)) != (row["dtype"], row["shape"]):
            raise ValueError(f"{UNPLANNED}{name} is {dtype} {list(shape)}, expected {row['dtype']} {row['shape']}")
        self._coming.popleft()
        if number == len(self._written):
            self._open_shard()

    def _open_shard(self) -> None:
        """Close the one before, and write the header of the next."""
        if self._stream is not None:
            self._stream.close()
        self._written.append(Inspection())
        self._stream = open(self._partial(len(self._written)), "wb", buffering=0)  # noqa: SIM115 (closed here or by __exit__)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.shards[len(self._written) - 1]}).encode()
        header = header.ljust(-(-(len(header) + 8) // PAGE) * PAGE - 8)
        self._write(memoryview(len(header).to_bytes(8, "little") + header))

    def _write(self, block: memoryview, name: str = "", dtype: str = "") -> None:
        assert self._stream is not None
        self._written[-1].see(block, name, dtype)
        write_all(self._stream, block)

    def _publish(self) -> None:
        """Give the shards their names, which hold their number, and write the index where there are several."""
        count = len(self.shards)
        numbered = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        names = numbered if count > 1 else ["model.safetensors"]
        for number, (name, inspection) in enumerate(zip(names, self._written, strict=True), 1):
            self._partial(number).rename(self.folder / name)
            inspection.remember(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            total = sum(row["data_offsets"][1] - row["data_offsets"][0] for shard in self.shards for row in shard.values())
            self._index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")

    @property
    def _index(self) -> Path:
        return self.folder / "model.safetensors.index.json"

    def _partial(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.partial"


def split_into_shards(tensors: Mapping[str, tuple[str, Sequence[int]]], shard_bytes: int) -> list[dict[str, dict[str, Any]]]:
    """The header of each shard: the rows of its tensors by name. A tensor larger than a shard has one of its own."""
    shards: list[dict[str, dict[str, Any]]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if size > 0 and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, size + nbytes]}
        size += nbytes
    return shards


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
