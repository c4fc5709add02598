"""Score text with a resident model, and beside a reference model, without ever holding [tokens, vocabulary] for a whole batch.

Windows are padded on the right, where a causal model cannot look, so no mask is needed. They go through the model whole, although the
last token's hidden state is not wanted: 511 tokens take a CPU 5 to 10 % longer than 512 (a model of 300 million). The output embedding
is applied to chunks of tokens: float32 logits of 8 windows of 2,048 tokens over 128,256 words would take 8 GB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.kv_sidecar import read_cache
from stages.functional.losses import kl_of, nll_of, top1_matches
from stages.runtime.int8_cache import Int8Cache, load_cache
from stages.runtime.loading import load_model
from stages.runtime.windows import Window, chunk_tokens, scored


@dataclass(frozen=True)
class Batch:
    """Windows that are scored together. Their scored tokens come window by window; those of all batches before it are `first`."""

    windows: Sequence[Window]
    first: int = 0

    @cached_property
    def ids(self) -> torch.Tensor:
        """[windows, longest] int64: padded on the right."""
        return padded(self.windows)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(window, position) of each token from which the next one is scored."""
        lengths = torch.tensor([len(window.ids) - 1 for window in self.windows])
        row, position = (torch.arange(self.ids.shape[1] - 1) < lengths[:, None]).nonzero(as_tuple=True)
        return row, position

    @property
    def tokens(self) -> int:
        return scored(self.windows)


def batched(work: Iterable[Sequence[Window]]) -> Iterator[Batch]:
    first = 0
    for windows in work:
        batch = Batch(windows, first)
        first += batch.tokens
        yield batch


@dataclass
class CacheBytes:
    """What an INT8 cache was measured to hold: at most for one sequence, and for each token."""

    per_sequence: float = 0.0
    per_token: float = 0.0

    def see(self, per_sequence: float, per_token: float) -> None:
        self.per_sequence, self.per_token = max(self.per_sequence, per_sequence), max(self.per_token, per_token)


class States(Protocol):
    """Hidden states of a model as it is served: computed, or stored when they were."""

    def states(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, hidden_size] as the output embedding takes them. Batches are asked for once each, in their order."""
        ...


class View(States, Protocol):
    """A model as it is served, on one device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def held(self) -> CacheBytes:
        """What its INT8 cache was seen to hold so far, where it has one."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] to float32 [tokens, vocabulary]."""
        ...


@dataclass(frozen=True)
class Stored:
    """What is stored already of a model, its reference, and it without its INT8 cache, and so takes no forward."""

    model: View | None = None
    reference: View | None = None
    plain_cache: States | None = None


class Scorer(Protocol):
    """A model beside its reference. `held` is what its INT8 cache was seen to hold, where it has one."""

    @property
    def held(self) -> CacheBytes: ...

    def scores(self, work: Sequence[Sequence[Window]], progress: Callable[[int, int], None]) -> Iterator["TokenScores"]:
        """Of every batch in turn."""
        ...


@dataclass(frozen=True)
class Served:
    """A resident model with the KV cache that it is served with; None is the ordinary one, in the model's dtype."""

    model: Any
    cache: Int8Cache | None = None
    held: CacheBytes = field(default_factory=CacheBytes)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    @property
    def vocab_size(self) -> int:
        size: int = self.model.config.vocab_size
        return size

    @torch.inference_mode()
    def states(self, batch: Batch) -> torch.Tensor:
        """Attention sees what the cache gives back."""
        ids, places = batch.ids.to(self.device), tuple(place.to(self.device) for place in batch.places)
        if self.cache is None:
            return hidden_states(self.model, ids)[places]
        self.cache.reset()
        states: torch.Tensor = self.model.get_decoder()(input_ids=ids, past_key_values=self.cache, use_cache=True).last_hidden_state
        self.held.see(self.cache.bytes_per_sequence, self.cache.bytes_per_token)
        return states[places]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden).float()
        return logits


@dataclass
class ResidentScorer:
    """Scores with whole models in memory, those whose hidden states are all `stored` aside."""

    folder: Path
    reference: Path | None
    device: torch.device
    dtype: torch.dtype  # of the computation
    stored: Stored = field(default_factory=Stored)

    def __post_init__(self) -> None:
        self.model = self.stored.model or load_served(self.folder, self.device, self.dtype)
        self.plain = self.stored.plain_cache or self._plain()
        self.beside = self.stored.reference or self._reference()

    def _reference(self) -> View | None:
        return load_served(self.reference, self.device, self.dtype) if self.reference else None

    def _plain(self) -> States | None:
        """The model without its INT8 cache, where it has one."""
        if read_cache(self.folder) is None:
            return None
        return Served(self.model.model if isinstance(self.model, Served) else load_model(self.folder, self.device, dtype=self.dtype))

    @property
    def held(self) -> CacheBytes:
        return self.model.held

    def scores(self, work: Sequence[Sequence[Window]], progress: Callable[[int, int], None]) -> Iterator["TokenScores"]:
        """Of every batch in turn."""
        for done, batch in enumerate(batched(work), 1):
            yield score_batch(batch, self.model, self.beside, self.plain)
            progress(done, len(work))


def load_served(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Served:
    """The folder's model, computing in `dtype` (default: its own), and the cache that its `kv_cache.json` asks for."""
    model = load_model(folder, device, dtype=dtype)
    return Served(model, load_cache(folder, model.config))


@dataclass(frozen=True)
class Comparison:
    """What another view of the same tokens says, one entry for each scored token."""

    nll: torch.Tensor  # float32, nats: of the other
    kl: torch.Tensor  # float32, nats: KL(other || model)
    top1: torch.Tensor  # bool


@dataclass(frozen=True)
class TokenScores:
    """One entry for each scored token. `reference` is another model, `plain_cache` the same weights without their INT8 cache."""

    document: torch.Tensor  # int64
    position: torch.Tensor  # int64: tokens before it in its window
    nll: torch.Tensor  # float32, nats
    reference: Comparison | None = None
    plain_cache: Comparison | None = None


def padded(batch: Sequence[Window]) -> torch.Tensor:
    """[windows, longest] int64: padded on the right."""
    width = max(len(window.ids) for window in batch)
    return torch.tensor([[*window.ids, *[0] * (width - len(window.ids))] for window in batch])


@torch.inference_mode()
def score_batch(batch: Batch, model: View, reference: View | None = None, plain_cache: States | None = None) -> TokenScores:
    """Losses of every scored token of the windows, on the CPU. All views are on one device.

    `plain_cache` is `model` without its INT8 cache; they have one output embedding.
    """
    device, (row, position) = model.device, batch.places
    targets = batch.ids[:, 1:][row, position].to(device)
    hidden = model.states(batch)
    others: dict[str, tuple[View, torch.Tensor]] = {}
    if reference is not None:
        others["reference"] = reference, reference.states(batch)
    if plain_cache is not None:
        others["plain_cache"] = model, plain_cache.states(batch)
    nll: list[torch.Tensor] = []
    compared: dict[str, list[Comparison]] = {name: [] for name in others}
    for chunk in torch.split(torch.arange(len(targets), device=device), chunk_tokens(model.vocab_size)):
        logits = model.logits(hidden[chunk])
        log_q = logits.log_softmax(-1)
        nll.append(nll_of(log_q, targets[chunk]))
        for name, (head, states) in others.items():
            compared[name].append(compare(head.logits(states[chunk]), logits, log_q, targets[chunk]))
    document = torch.tensor([window.document for window in batch.windows])[row]
    return TokenScores(document, position + 1, torch.cat(nll).cpu(), **{name: join(parts) for name, parts in compared.items()})


def compare(expected: torch.Tensor, logits: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor) -> Comparison:
    """Logits [tokens, vocabulary] of the other view and of the model, whose log-probabilities are `log_q`."""
    log_p = expected.log_softmax(-1)
    return Comparison(nll_of(log_p, targets), kl_of(log_p, log_q), top1_matches(expected, logits))


def join(parts: Sequence[Comparison]) -> Comparison:
    """On the CPU."""
    columns = ([part.nll for part in parts], [part.kl for part in parts], [part.top1 for part in parts])
    return Comparison(*(torch.cat(column).cpu() for column in columns))


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[windows, length, hidden_size] as the output embedding takes them, without a cache."""
    states: torch.Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first of each window: ids [windows, length] -> [windows * (length - 1)] float32."""
    return score_batch(Batch([Window(n, row) for n, row in enumerate(ids.tolist())]), Served(model)).nll
