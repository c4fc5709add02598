"""How a teacher's logits stand on disk, known before any of them is computed. Needs no torch: a plan reads it.

    logits.json                        what they are of (`LogitsFile`), written last
    logits-00001-of-0000N.safetensors  windows in their order, about FILE_BYTES in each file:
        windows    I32  [n, T]     token ids of the text that the teacher read
        ids        U16  [n, T, k]  the k words of largest logit after each of those tokens; I32 above 65,536 words
        logits     as the teacher computes them, so that nothing is rounded [n, T, k], falling
        logsumexp  F32  [n, T]     of logits / temperature over the whole vocabulary: what the words that are not kept weigh

With 16-bit logits and k = 32 that is 136 bytes a token; the logits of 128,256 words would take 256,512.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pipeline.artifact_spec import LogitsSpec
from pipeline.headers import ITEM_BYTES, CheckpointFileError, read_json
from pipeline.layout import DType, Frozen

LOGITS_FILE = "logits.json"
SHARDS = "logits-*-of-*.safetensors"
FILE_BYTES = 16 << 20  # an interruption loses about as much: with k = 32 some 120,000 tokens
UINT16_WORDS = 1 << 16  # ids of a vocabulary of at most so many words fit in 16 bits


class LogitsFile(Frozen):
    """The content of `logits.json`. `data` is the digest of the text's file, `tokenizer` that of the tokenizer that cut it."""

    format_version: Literal[1] = 1
    vocab_size: int
    k: int
    temperature: float
    num_samples: int
    max_length: int
    dtype: DType
    data: str
    tokenizer: str | None

    @classmethod
    def load(cls, folder: Path) -> "LogitsFile":
        """CheckpointFileError where the file cannot be understood, OSError where there is none."""
        content = read_json(folder / LOGITS_FILE)
        try:
            return cls.model_validate(content)
        except ValidationError:
            raise CheckpointFileError(f"{folder / LOGITS_FILE} is not what this version writes; make the logits again") from None

    def tensors(self, windows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of a file that holds so many windows."""
        rows = (windows, self.max_length)
        return {
            "windows": ("I32", rows),
            "ids": ("U16" if self.vocab_size <= UINT16_WORDS else "I32", (*rows, self.k)),
            "logits": (self.dtype, (*rows, self.k)),
            "logsumexp": ("F32", rows),
        }

    @property
    def window_bytes(self) -> int:
        """Of one window, in its file."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.tensors(1).values())

    @property
    def windows_per_file(self) -> int:
        """In each file but the last."""
        return max(1, FILE_BYTES // self.window_bytes)

    @property
    def spec(self) -> LogitsSpec:
        shared = self.model_dump(include={"vocab_size", "k", "temperature", "num_samples", "max_length", "data"})
        return LogitsSpec(**shared, nbytes=self.num_samples * self.window_bytes)
