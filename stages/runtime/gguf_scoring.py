"""Score text with llama.cpp, from the same token ids and windows as transformers does, and beside a reference that transformers computes.

llama.cpp gives logits of a chunk of one window at a time. The reference's hidden states of the batch are there by then, and its logits
are computed for the same chunk, so that no more of them is in memory than with two models of transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch

from pipeline.artifact import Checkpoint, Dataset, Export
from stages.functional.losses import nll_of
from stages.runtime.llama_cpp_engine import LlamaContext, LlamaModel, Token, check_tokens
from stages.runtime.scoring import Batch, CacheBytes, Comparison, TokenScores, View, batched, compare, join, load_served
from stages.runtime.swept import Swept, load_swept, swept_batches
from stages.runtime.text import encode_documents, load_tokenizer
from stages.runtime.windows import Window


def reference_view(reference: Checkpoint, device: torch.device, dtype: torch.dtype, layerwise: bool) -> View:
    return (load_swept if layerwise else load_served)(reference.path, device, dtype)


class LlamaCppScorer:
    """`held` is what the export's INT8 cache was seen to hold."""

    def __init__(
        self, export: Export, length: int, beside: View | None, hidden_bytes: int, dataset: Dataset, max_documents: int | None
    ) -> None:
        """Windows have up to `length` tokens. ValueError where llama.cpp reads the dataset's text as other tokens than transformers."""
        self.export, self.length, self.beside, self.hidden_bytes = export, length, beside, hidden_bytes
        self.int8 = export.model_spec.kv_cache.mode is not None
        self.held = CacheBytes()
        check_dataset(export, dataset, max_documents)

    def scores(self, work: Sequence[Sequence[Window]], progress: Callable[[int, int], None]) -> Iterator[TokenScores]:
        """Of every batch in turn."""
        threads = torch.get_num_threads()
        with ExitStack() as opened:
            model = opened.enter_context(LlamaModel(self.export.file))
            served = opened.enter_context(LlamaContext(model, self.length, self.int8, threads))
            plain = opened.enter_context(LlamaContext(model, self.length, False, threads)) if self.int8 else None
            for done, batch in enumerate(self._batches(work), 1):
                yield self._score(batch, served, plain)
                progress(done, len(work))
            if plain is not None:
                self._measure(max((window for batch in work for window in batch), key=lambda w: len(w.ids)), served, plain)

    def _batches(self, work: Sequence[Sequence[Window]]) -> Iterator[Batch]:
        """Where only a layer of the reference is in memory, hidden states of many are computed together."""
        if isinstance(self.beside, Swept):
            return swept_batches([self.beside], work, self.hidden_bytes, lambda done, total: None)
        return batched(work)

    @torch.inference_mode()
    def _score(self, batch: Batch, served: LlamaContext, plain: LlamaContext | None) -> TokenScores:
        states = self.beside.states(batch) if self.beside is not None else None
        row = 0  # of `states`: where the window's begin
        nll: list[torch.Tensor] = []
        references: list[Comparison] = []
        plains: list[Comparison] = []
        for window in batch.windows:
            targets = torch.tensor(window.ids[1:])
            without = plain.logits(window.ids[:-1]) if plain is not None else None
            for first, logits in served.logits(window.ids[:-1]):
                chunk = slice(first, first + len(logits))
                log_q = logits.log_softmax(-1)
                nll.append(nll_of(log_q, targets[chunk]))
                if self.beside is not None and states is not None:
                    expected = self.beside.logits(states[row + first : row + first + len(logits)]).cpu()
                    references.append(compare(expected, logits, log_q, targets[chunk]))
                if without is not None:
                    plains.append(compare(next(without)[1], logits, log_q, targets[chunk]))
            row += len(targets)
        lengths = torch.tensor([len(window.ids) - 1 for window in batch.windows])
        return TokenScores(
            document=torch.tensor([window.document for window in batch.windows]).repeat_interleave(lengths),
            position=torch.cat([torch.arange(1, length + 1) for length in lengths.tolist()]),
            nll=torch.cat(nll),
            reference=join(references) if references else None,
            plain_cache=join(plains) if plains else None,
        )

    def _measure(self, longest: Window, served: LlamaContext, plain: LlamaContext) -> None:
        """Bytes of the INT8 cache: what its state grows by a token, beside what a 16-bit cache does, whose size is known. Both keep
        the same notes of each token."""
        ordinary = self.export.model_spec.with_cache(None).kv_cache.bytes_per_token
        ids = longest.ids[: served.chunk]
        grown = [growth(context, ids) for context in (served, plain)]
        per_token = grown[0] - grown[1] + ordinary
        self.held.see(per_token * len(longest.ids), per_token)


def growth(context: LlamaContext, ids: Sequence[int]) -> float:
    """Bytes of state that each token after the first adds."""
    context.clear()
    context.decode([Token(ids[0], 0)])
    before = context.state_bytes()
    context.decode([Token(token, 1 + n) for n, token in enumerate(ids[1:])])
    return (context.state_bytes() - before) / (len(ids) - 1)


def check_dataset(export: Export, dataset: Dataset, max_documents: int | None) -> None:
    """ValueError where llama.cpp reads a document as other tokens than transformers."""
    tokenizer = load_tokenizer(export.path)
    documents = encode_documents(dataset, tokenizer)[:max_documents]
    with LlamaModel(export.file, vocabulary_only=True) as model:
        check_tokens(model, tokenizer, ((f"document {name}", text) for name, text, _ in documents))
