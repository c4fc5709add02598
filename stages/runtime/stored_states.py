"""Hidden states written as they are computed, and read again batch by batch in the place of the model that computed them."""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch.nn import functional

from pipeline.headers import CheckpointFileError, read_header
from stages.runtime.scoring import Batch, CacheBytes
from stages.runtime.states_layout import SHARD_BYTES, STATES_FILE, TENSOR, StatesFile
from stages.runtime.tensors import DTYPE_NAMES, TensorReader, as_bytes, write_all
from stages.runtime.vocabulary import read_output_embedding


class StatesWriter:
    """A context manager that takes the rows of a text in order, as many as `layout` says. `states.json` is written by `finish`."""

    def __init__(self, folder: Path, layout: StatesFile, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.layout = folder, layout
        self.waiting = layout.shards(shard_bytes)
        self.stream: BinaryIO | None = None
        self.room = 0  # rows that the open file still takes

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.stream is not None:
            self.stream.close()

    def add(self, states: torch.Tensor) -> None:
        """[tokens, hidden_size], on any device."""
        assert DTYPE_NAMES[states.dtype] == self.layout.dtype and states.shape[1] == self.layout.hidden_size, "another model's states"
        while len(states):
            if not self.room:
                self._open()
            assert self.stream is not None
            rows, states = states[: self.room], states[self.room :]
            write_all(self.stream, as_bytes(rows.cpu().contiguous()))
            self.room -= len(rows)

    def finish(self, held: CacheBytes) -> None:
        """`held`: what the model's INT8 cache was seen to hold."""
        assert not self.waiting and not self.room, "the text has more tokens"
        told = {"cache_bytes_per_sequence": held.per_sequence, "cache_bytes_per_token": held.per_token}
        content = self.layout.model_copy(update=told).model_dump_json(indent=1)
        (self.folder / STATES_FILE).write_text(content + "\n", encoding="utf-8")

    def _open(self) -> None:
        """The next file, with its header: a file that was cut short is smaller than that says."""
        if self.stream is not None:
            self.stream.close()
        name, self.room = self.waiting.pop(0)
        row = {"dtype": self.layout.dtype, "shape": [self.room, self.layout.hidden_size]}
        header = json.dumps({TENSOR: {**row, "data_offsets": [0, self.room * self.layout.row_bytes]}}).encode()
        header = header.ljust(-(-len(header) // 8) * 8)
        self.stream = open(self.folder / name, "wb", buffering=0)  # noqa: SIM115 (closed by the next one, or by __exit__)
        write_all(self.stream, memoryview(len(header).to_bytes(8, "little") + header))


class StoredStates(TensorReader):
    """What a `StatesWriter` left in a folder. Only the rows that are asked for are read.

    CheckpointFileError where files are missing, damaged or others than `states.json` says, or where they are of another text than one of
    `tokens` scored tokens.
    """

    def __init__(self, folder: Path, tokens: int, device: torch.device) -> None:
        self.folder, self.layout, self.device = folder, StatesFile.load(folder), device
        files = sorted(folder.glob(f"{TENSOR}-*.safetensors"))
        self.table = {str(number): read_header(file)[TENSOR] for number, file in enumerate(files)}
        self.starts = [0, *accumulate(entry.shape[0] for entry in self.table.values())]  # of each file's rows; the last: of all
        alike = all((entry.dtype, entry.shape[1]) == (self.layout.dtype, self.layout.hidden_size) for entry in self.table.values())
        if not alike or not self.starts[-1] == self.layout.tokens == tokens:
            raise CheckpointFileError(f"{folder} holds hidden states of {self.starts[-1]:,} tokens, not of the {tokens:,} of this text")

    @property
    def held(self) -> CacheBytes:
        return CacheBytes(self.layout.cache_bytes_per_sequence, self.layout.cache_bytes_per_token)

    def states(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, hidden_size] of a batch."""
        return self.rows(batch.first, batch.first + batch.tokens).to(self.device)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """[last - first, hidden_size], on the CPU."""
        parts = []
        while first < last:
            number = bisect_right(self.starts, first) - 1
            end = min(last, self.starts[number + 1])
            parts.append(self.read(str(number), (first - self.starts[number], end - self.starts[number])))
            first = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class StoredView(StoredStates):
    """A model that is served by its stored states: of its weights, the output embedding alone is in memory."""

    def __init__(self, folder: Path, tokens: int, model: Path, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(folder, tokens, device)
        self._head = read_output_embedding(model, device, dtype)

    @property
    def vocab_size(self) -> int:
        return len(self._head)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self._head).float()
