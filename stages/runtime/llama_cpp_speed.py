"""llama.cpp as an engine to be timed, on the CPU, in this very process: prompts in chunks, then a token for each sequence at a time."""

import time

import torch

from pipeline.artifact import Export
from pipeline.gguf_file import read_gguf
from stages.runtime.llama_cpp_engine import LlamaContext, LlamaModel, Token


class LlamaCppEngine:
    """Up to `batch_size` sequences of up to `max_tokens` tokens each, with the export's own KV cache."""

    label = "llama.cpp"

    def __init__(self, export: Export, max_tokens: int, batch_size: int) -> None:
        """ValueError where llama.cpp cannot load the file."""
        self.device = torch.device("cpu")
        self.nbytes = read_gguf(export.file).tensor_bytes
        started = time.perf_counter()
        self.model = LlamaModel(export.file)
        int8 = export.model_spec.kv_cache.mode is not None
        self.context = LlamaContext(self.model, max_tokens, int8, torch.get_num_threads(), batch_size)
        self.load_seconds = time.perf_counter() - started

    def run(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """Greedy; of a prompt only the last token's logits are computed."""
        length = prompt.shape[1]
        tokens = [Token(number, at, row, at == length - 1) for row, ids in enumerate(prompt.tolist()) for at, number in enumerate(ids)]
        self.context.clear()
        started = time.perf_counter()
        chunks = [tokens[first : first + self.context.chunk] for first in range(0, len(tokens), self.context.chunk)]
        latest = torch.cat([self.context.decode(chunk) for chunk in chunks]).argmax(-1).tolist()
        read = time.perf_counter()
        for position in range(length, length + new_tokens - 1):
            step = [Token(number, position, row, output=True) for row, number in enumerate(latest)]
            latest = self.context.decode(step).argmax(-1).tolist()
        return read - started, time.perf_counter() - read

    def weights_bytes(self) -> int:
        return self.nbytes

    def cache_bytes(self) -> int | None:
        """It is taken in advance, for every sequence at its longest."""
        return None

    def close(self) -> None:
        self.context.__exit__()
        self.model.__exit__()
