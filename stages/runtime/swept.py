"""Score text with models of which only one layer is in memory: `LayerwiseModel` in the place of a resident one.

The batches are carried through the layers in groups, whose hidden states fit into a given memory; a group reads all weights once for each
view of the models (the scored one, it without its INT8 cache, the reference). The losses are those of resident models: the layers
are called alike, and what follows them is the same code.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig

from stages.runtime.int8_cache import load_cache
from stages.runtime.layerwise import LayerwiseModel
from stages.runtime.scoring import CacheBytes, TokenScores, padded, score_batch
from stages.runtime.windows import Window, group_batches


class Swept:
    """A view of a checkpoint: `sweep` computes the hidden states of a group, which `hidden_states` then gives out batch by batch."""

    def __init__(self, model: LayerwiseModel, cache: Any | None = None) -> None:
        self.model, self.cache = model, cache
        self.device = model.device
        self.per_token: dict[int, float] = {}  # measured bytes of the cache, by layer
        self.per_sequence: dict[int, float] = {}
        self._states: deque[torch.Tensor] = deque()
        self._head: torch.Tensor | None = None

    def sweep(self, batches: Sequence[torch.Tensor], progress: Callable[[], None]) -> None:
        """Token ids [windows, length] of each batch; `progress` is called for each layer."""

        def on_layer(index: int, layer: torch.nn.Module) -> tuple[()]:
            progress()
            return ()

        self._head = None  # not beside the layers
        self._states = deque(self.model.sweep(batches, on_layer=on_layer, on_output=self._measure, cache=self.cache))
        self._head = self.model.output_embedding()

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        states = self._states.popleft()
        assert states.shape[:2] == ids.shape, "batches come in the order of the sweep"
        return states.to(self.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._head is not None, "sweep comes first"
        return functional.linear(hidden, self._head).float()

    def _measure(self, index: int, batch: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if self.cache is not None:
            layer = self.cache.layers[index]
            self.per_token[index] = max(self.per_token.get(index, 0.0), layer.bytes_per_token)
            self.per_sequence[index] = max(self.per_sequence.get(index, 0.0), layer.bytes_per_token * layer.length)


class LayerwiseScorer:
    """As `ResidentScorer`, in the memory of the largest layer, the output embeddings, and `hidden_bytes` of hidden states."""

    def __init__(self, folder: Path, reference: Path | None, device: torch.device, dtype: torch.dtype, hidden_bytes: int) -> None:
        model = LayerwiseModel(folder, dtype, device)
        self.cache = load_cache(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))
        self.view = Swept(model, self.cache)
        self.plain = Swept(model) if self.cache is not None else None
        self.beside = load_swept(reference, device, dtype) if reference else None
        self.held = CacheBytes()
        self.hidden_bytes = hidden_bytes

    def scores(self, work: Sequence[Sequence[Window]], progress: Callable[[int, int], None]) -> Iterator[TokenScores]:
        """Of every batch in turn."""
        views = [view for view in (self.view, self.plain, self.beside) if view is not None]
        architecture = self.view.model.spec.architecture
        token_bytes = architecture.hidden_size * self.view.model.dtype.itemsize * len(views)
        groups = list(group_batches(work, max(1, self.hidden_bytes // token_bytes)))
        total = len(groups) * sum(len(view.model.layers) for view in views)
        done = 0

        def layer_done() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        for group in groups:
            batches = [padded(batch) for batch in group]
            for view in views:
                view.sweep(batches, layer_done)
            for batch in group:
                yield score_batch(batch, architecture.vocab_size, self.view, self.beside, self.plain)
        if self.cache is not None:
            self.held.see(sum(self.view.per_sequence.values()), sum(self.view.per_token.values()))


def load_swept(folder: Path, device: torch.device, dtype: torch.dtype) -> Swept:
    """The folder's model, computing in `dtype`, and the cache that its `kv_cache.json` asks for."""
    return Swept(LayerwiseModel(folder, dtype, device), load_cache(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False)))
