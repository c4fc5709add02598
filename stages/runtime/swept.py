"""Score text with models of which only one layer is in memory: `LayerwiseModel` in the place of a resident one.

The batches are carried through the layers in groups, whose hidden states fit into a given memory; a group reads all weights once for each
view of the models (the scored one, it without its INT8 cache, the reference). The losses are those of resident models: the layers
are called alike, and what follows them is the same code.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig

from pipeline.kv_sidecar import read_cache
from stages.runtime.int8_cache import load_cache
from stages.runtime.layerwise import LayerwiseModel
from stages.runtime.scoring import Batch, CacheBytes, Served, States, Stored, TokenScores, View, batched, score_batch
from stages.runtime.windows import Window, group_batches


class Swept:
    """A view of a checkpoint: `sweep` computes the hidden states of a group, which `states` then gives out batch by batch.

    Its output embedding is in memory from the first logits of a group until the next sweep.
    """

    def __init__(self, model: LayerwiseModel, cache: Any | None = None) -> None:
        self.model, self.cache = model, cache
        self.device, self.vocab_size = model.device, model.spec.architecture.vocab_size
        self.per_token: dict[int, float] = {}  # measured bytes of the cache, by layer
        self.per_sequence: dict[int, float] = {}
        self._states: deque[torch.Tensor] = deque()
        self._head: torch.Tensor | None = None

    def sweep(self, batches: Sequence[Batch], progress: Callable[[], None]) -> None:
        """`progress` is called for each layer."""

        def on_layer(index: int, layer: torch.nn.Module) -> tuple[()]:
            progress()
            return ()

        self._head = None  # not beside the layers
        ids = [batch.ids for batch in batches]
        self._states = deque(self.model.sweep(ids, on_layer=on_layer, on_output=self._measure, cache=self.cache))

    def states(self, batch: Batch) -> torch.Tensor:
        states = self._states.popleft()
        assert states.shape[:2] == batch.ids.shape, "batches come in the order of the sweep"
        return states[batch.places].to(self.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            self._head = self.model.output_embedding()
        return functional.linear(hidden, self._head).float()

    @property
    def token_bytes(self) -> int:
        """Of hidden states."""
        return self.model.spec.architecture.hidden_size * self.model.dtype.itemsize

    @property
    def held(self) -> CacheBytes:
        return CacheBytes(sum(self.per_sequence.values()), sum(self.per_token.values()))

    def _measure(self, index: int, batch: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if self.cache is not None:
            layer = self.cache.layers[index]
            self.per_token[index] = max(self.per_token.get(index, 0.0), layer.bytes_per_token)
            self.per_sequence[index] = max(self.per_sequence.get(index, 0.0), layer.bytes_per_token * layer.length)


class LayerwiseScorer:
    """As `ResidentScorer`, in the memory of the largest layer, the output embeddings, and `hidden_bytes` of hidden states."""

    def __init__(
        self,
        folder: Path,
        reference: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        hidden_bytes: int,
        stored: Stored | None = None,
    ) -> None:
        stored = stored or Stored()
        self.view: View = stored.model or load_swept(folder, device, dtype)
        self.plain = stored.plain_cache or self._plain(folder, device, dtype)
        self.beside: View | None = stored.reference or (load_swept(reference, device, dtype) if reference else None)
        self.hidden_bytes = hidden_bytes

    def _plain(self, folder: Path, device: torch.device, dtype: torch.dtype) -> States | None:
        """The model without its INT8 cache, where it has one."""
        if read_cache(folder) is None:
            return None
        return Swept(self.view.model if isinstance(self.view, Swept) else LayerwiseModel(folder, dtype, device))

    @property
    def held(self) -> CacheBytes:
        return self.view.held

    def scores(self, work: Sequence[Sequence[Window]], progress: Callable[[int, int], None]) -> Iterator[TokenScores]:
        """Of every batch in turn."""
        views = [view for view in (self.view, self.plain, self.beside) if isinstance(view, Swept)]
        for done, batch in enumerate(swept_batches(views, work, self.hidden_bytes, progress), 1):
            yield score_batch(batch, self.view, self.beside, self.plain)
            if not views:
                progress(done, len(work))


def swept_batches(
    views: Sequence[Swept], work: Sequence[Sequence[Window]], hidden_bytes: int, progress: Callable[[int, int], None]
) -> Iterator[Batch]:
    """Every batch in turn, its hidden states of all views computed, which take `hidden_bytes` at a time. `progress` counts layers."""
    batches = batched(work)
    groups = list(group_batches(work, max(1, hidden_bytes // max(1, sum(view.token_bytes for view in views)))))
    total, done = len(groups) * sum(len(view.model.layers) for view in views), 0

    def layer_done() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for group in groups:
        together = list(islice(batches, len(group)))
        for view in views:
            view.sweep(together, layer_done)
        yield from together


def computed_batches(
    view: Served | Swept, work: Sequence[Sequence[Window]], hidden_bytes: int, progress: Callable[[int, int], None]
) -> Iterator[Batch]:
    """Every batch in turn, for a model that is resident or not."""
    if isinstance(view, Swept):
        yield from swept_batches([view], work, hidden_bytes, progress)
        return
    for done, batch in enumerate(batched(work), 1):
        yield batch
        progress(done, len(work))


def load_swept(folder: Path, device: torch.device, dtype: torch.dtype) -> Swept:
    """The folder's model, computing in `dtype`, and the cache that its `kv_cache.json` asks for."""
    return Swept(LayerwiseModel(folder, dtype, device), load_cache(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False)))
