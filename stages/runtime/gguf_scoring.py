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
from stages.runtime.scoring import CacheBytes, Comparison, Served, TokenScores, View, compare, join, load_served, padded
from stages.runtime.swept import Swept, load_swept
from stages.runtime.text import encode_documents, load_tokenizer
from stages.runtime.windows import Window, group_batches

Resident = Served | Swept


def reference_view(reference: Checkpoint, device: torch.device, dtype: torch.dtype, layerwise: bool) -> Resident:
    return (load_swept if layerwise else load_served)(reference.path, device, dtype)


class LlamaCppScorer:
    """`held` is what the export's INT8 cache was seen to hold."""

    def __init__(
        self, export: Export, length: int, beside: Resident | None, hidden_bytes: int, dataset: Dataset, max_documents: int | None
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
            done = 0
            for group in self._groups(work):
                for batch in group:
                    yield self._score(batch, served, plain)
                    done += 1
                    progress(done, len(work))
            if plain is not None:
                self._measure(max((window for batch in work for window in batch), key=lambda w: len(w.ids)), served, plain)

    def _groups(self, work: Sequence[Sequence[Window]]) -> Iterator[Sequence[Sequence[Window]]]:
        """Batches whose hidden states of the reference are computed together, where only a layer of it is in memory."""
        if not isinstance(self.beside, Swept):
            yield work
            return
        token_bytes = self.beside.model.spec.architecture.hidden_size * self.beside.model.dtype.itemsize
        for group in group_batches(work, max(1, self.hidden_bytes // token_bytes)):
            self.beside.sweep([padded(batch) for batch in group], lambda: None)
            yield group

    @torch.inference_mode()
    def _score(self, batch: Sequence[Window], served: LlamaContext, plain: LlamaContext | None) -> TokenScores:
        states = self.beside.hidden_states(padded(batch).to(self.beside.device)) if self.beside is not None else None
        nll: list[torch.Tensor] = []
        references: list[Comparison] = []
        plains: list[Comparison] = []
        for row, window in enumerate(batch):
            targets = torch.tensor(window.ids[1:])
            without = plain.logits(window.ids[:-1]) if plain is not None else None
            for first, logits in served.logits(window.ids[:-1]):
                chunk = slice(first, first + len(logits))
                log_q = logits.log_softmax(-1)
                nll.append(nll_of(log_q, targets[chunk]))
                if self.beside is not None and states is not None:
                    expected = reference_logits(self.beside, states[row, chunk])
                    references.append(compare(expected, logits, log_q, targets[chunk]))
                if without is not None:
                    plains.append(compare(next(without)[1], logits, log_q, targets[chunk]))
        lengths = torch.tensor([len(window.ids) - 1 for window in batch])
        return TokenScores(
            document=torch.tensor([window.document for window in batch]).repeat_interleave(lengths),
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


def reference_logits(view: View, hidden: torch.Tensor) -> torch.Tensor:
    return view.logits(hidden).cpu()


def check_dataset(export: Export, dataset: Dataset, max_documents: int | None) -> None:
    """ValueError where llama.cpp reads a document as other tokens than transformers."""
    tokenizer = load_tokenizer(export.path)
    documents = encode_documents(dataset, tokenizer)[:max_documents]
    with LlamaModel(export.file, vocabulary_only=True) as model:
        check_tokens(model, tokenizer, ((f"document {name}", text) for name, text, _ in documents))
