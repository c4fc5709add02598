"""llama.cpp in this process, by its C interface: quantize a GGUF file, read text as it does, compute logits.

Its Python class keeps the logits of a whole context; here they come chunk by chunk, since those of 2,048 tokens over 128,256 words take
1 GB. `llama_cpp` belongs to the extra `gguf`. Facts: llama.h of llama.cpp, as built into llama-cpp-python 0.3.36; values can be stored as
q8_0 only under flash attention.
"""

import ctypes
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import llama_cpp
import numpy as np
import torch

from stages.runtime.gguf_tokenizer import tokenizer_kind
from stages.runtime.windows import chunk_tokens

log = logging.getLogger(__name__)
FILE_TYPES = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q5_K_M": "LLAMA_FTYPE_MOSTLY_Q5_K_M", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
              "Q2_K": "LLAMA_FTYPE_MOSTLY_Q2_K"}  # fmt: skip
ROWS_BYTES = 256 << 20  # of rows that are quantized at once, as read, in float32 and as written
WARNING, CONTINUED = 3, 5  # log levels of ggml.h: warnings and errors are below CONTINUED, which prolongs the message before
MICRO_BATCH = 512
SHOWN = 20  # characters of a text where two tokenizers part


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Warnings and errors alone: llama.cpp says a line for each tensor."""
    if WARNING <= level < CONTINUED:
        log.warning(text.decode("utf-8", "replace").rstrip())


llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


def quantize(source: Path, target: Path, form: str, threads: int) -> None:
    """Write `target` in that format (llama.cpp's mixes, without an importance matrix). RuntimeError where llama.cpp refuses."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, FILE_TYPES[form])
    settings.nthread = threads
    settings.max_buf_size = ROWS_BYTES
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
    if status:
        raise RuntimeError(f"llama.cpp could not quantize to {form} (status {status}); its own message is above")


class LlamaModel:
    """A GGUF file that llama.cpp has opened (memory-mapped). A context manager."""

    def __init__(self, file: Path, vocabulary_only: bool = False) -> None:
        """ValueError where llama.cpp cannot load it."""
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = vocabulary_only
        settings.n_gpu_layers = 0  # built for CPUs or not: what is measured is the same
        self.pointer: Any = llama_cpp.llama_model_load_from_file(bytes(file), settings)
        if not self.pointer:
            raise ValueError(f"{file} is not loaded by llama.cpp; its own message is in the log")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self.pointer)
        self.pointer = None

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens in the text recognized, and what the model wants around a text added."""
        content = text.encode()
        room = len(content) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, content, len(content), ids, room, True, True)
        assert count >= 0, "no text has more tokens than bytes, but for those around it"
        return list(ids[:count])


class Token(NamedTuple):
    """One token to compute; `output`: whether its logits are wanted."""

    id: int
    position: int
    sequence: int = 0
    output: bool = False


class LlamaContext:
    """`sequences` of up to `length` tokens of a model. `int8`: their KV cache as q8_0, else in 16 bits. A context manager."""

    def __init__(self, model: LlamaModel, length: int, int8: bool, threads: int, sequences: int = 1) -> None:
        """ValueError where llama.cpp cannot make it."""
        settings = llama_cpp.llama_context_default_params()
        self.model, self.length = model, length
        self.chunk = max(min(length, chunk_tokens(model.vocab_size)), sequences)
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = length * sequences, sequences, False
        settings.n_batch, settings.n_ubatch = self.chunk, min(self.chunk, MICRO_BATCH)
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_Q8_0 if int8 else llama_cpp.GGML_TYPE_F16
        self.pointer: Any = llama_cpp.llama_init_from_model(model.pointer, settings)
        if not self.pointer:
            raise ValueError(f"llama.cpp cannot hold a cache of {length} tokens for this model; its own message is in the log")
        self.batch = llama_cpp.llama_batch_init(self.chunk, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.pointer)
        self.pointer = None

    def clear(self) -> None:
        """Forget all tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.pointer), True)

    def decode(self, tokens: Sequence[Token]) -> torch.Tensor:
        """Append at most `chunk` tokens to their sequences; float32 logits [outputs, vocabulary]."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for n, token in enumerate(tokens):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token.id, token.position, 1, token.sequence
            batch.logits[n] = token.output
        status = llama_cpp.llama_decode(self.pointer, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not compute {len(tokens)} tokens from position {tokens[0].position} on (status {status})")
        rows = sum(token.output for token in tokens)
        if not rows:
            return torch.empty(0, self.model.vocab_size)
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.pointer), (rows, self.model.vocab_size))
        return torch.from_numpy(found.copy())

    def logits(self, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Of a window, chunk by chunk: (position of its first token, float32 [tokens, vocabulary])."""
        self.clear()
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            yield first, self.decode([Token(token, first + n, output=True) for n, token in enumerate(part)])

    def state_bytes(self) -> int:
        """Of the first sequence, with what llama.cpp notes of each token."""
        size: int = llama_cpp.llama_state_seq_get_size(self.pointer, 0)
        return size


def check_tokens(model: LlamaModel, tokenizer: Any, texts: Iterable[tuple[str, str]]) -> int:
    """Tokens of all the (name, text), which llama.cpp and transformers read alike. ValueError names the first place where they do not.

    Spaces that a text begins with are left out where the two are known to differ in them (`TokenizerKind.metaspace`).
    """
    count, metaspace = 0, tokenizer_kind(json.loads(tokenizer.backend_tokenizer.to_str())).metaspace
    for name, written in texts:
        text = written.lstrip(" ") if metaspace else written
        theirs, ours = model.encode(text), tokenizer(text)["input_ids"]
        if theirs != ours:
            at = next((n for n, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
            start = len(tokenizer.decode(ours[:at], skip_special_tokens=True))
            raise ValueError(
                f"llama.cpp reads {name} as other tokens than transformers: from token {at} on {theirs[at : at + 3]} instead of "
                f"{ours[at : at + 3]}, near {text[start : start + SHOWN]!a}; a model that reads other tokens would only seem worse"
            )
        count += len(ours)
    return count
