"""How a model's final hidden states over a text stand on disk. Needs no torch: a plan reads it.

    states.json                         what they are of (`StatesFile`), written last
    states-00001-of-0000N.safetensors   one tensor each, `states` [tokens, hidden_size], as the output embedding takes them

A row for each token from which another one is scored: those of a window but its last, window after window in the order in which
`cut_windows` gives them. So where the rows of a window stand follows from the text alone, whatever the batches were.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.artifact_spec import DatasetSpec, StatesSpec
from pipeline.headers import ITEM_BYTES, CheckpointFileError, read_json
from pipeline.layout import DType, Frozen
from pipeline.spec import ModelSpec
from stages.runtime.stage_work import read_share

STATES_FILE = "states.json"
TENSOR = "states"
SHARD_BYTES = 5 * 10**9
FEW_WORDS = 1024  # a vocabulary of fewer knows little more than bytes ...
LEAST_TOKEN_BYTES = (1, 2)  # ... so a token may be one; else a plan allows for means of 2, where English has 4


class StatesFile(Frozen):
    """The content of `states.json`. `cache_bytes_*`: what the model's INT8 cache was measured to hold; 0 without one."""

    format_version: Literal[1] = 1
    tokens: int
    hidden_size: int
    dtype: DType
    cache_bytes_per_sequence: float = 0.0
    cache_bytes_per_token: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> "StatesFile":
        """CheckpointFileError where the file cannot be understood, OSError where there is none."""
        content = read_json(folder / STATES_FILE)
        try:
            return cls.model_validate(content)
        except ValidationError:
            raise CheckpointFileError(f"{folder / STATES_FILE} is not what this version writes; remove its folder") from None

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * ITEM_BYTES[self.dtype]

    def shards(self, shard_bytes: int = SHARD_BYTES) -> list[tuple[str, int]]:
        """(name, rows) of each file."""
        most = max(1, shard_bytes // self.row_bytes)
        count = max(1, math.ceil(self.tokens / most))
        rows = [min(most, self.tokens - n * most) for n in range(count)]
        return [(f"states-{n:05d}-of-{count:05d}.safetensors", row) for n, row in enumerate(rows, 1)]


def states_spec(model: ModelSpec, text: DatasetSpec, max_documents: int | None) -> StatesSpec:
    """Of that many documents of a text. More than that it takes in scripts of which the vocabulary has only the bytes."""
    least = LEAST_TOKEN_BYTES[model.architecture.vocab_size >= FEW_WORDS]
    most, hidden_size = math.ceil(read_share(text, max_documents) * text.nbytes / least), model.architecture.hidden_size
    return StatesSpec(hidden_size=hidden_size, dtype=model.dtype, nbytes=most * hidden_size * ITEM_BYTES[model.dtype])
