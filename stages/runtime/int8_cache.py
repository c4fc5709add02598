"""A KV cache for transformers that stores keys and values as INT8, and nothing else between two calls.

Two modes (pipeline/layout.py): `per_token_head` gives each vector of head_dim numbers its own fp32 scale; `static` has one scale for
each layer and KV head, found by calibration. Attention is given the dequantized keys and values of all tokens, those of the current
call included. So one forward over a whole text computes what token-by-token decoding does, and a perplexity measured that
way is that of serving with this cache.

    cache = load_cache(folder, model.config)            # None where the checkpoint asks for no INT8 cache
    model.generate(ids, past_key_values=cache, max_new_tokens=100)

It saves memory, not time: a layer's keys and values are dequantized on every call, and live for that call.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from pipeline.kv_sidecar import CacheSettings, read_cache
from stages.functional.int8 import absmax_scale, dequantize, quantize
from stages.runtime.cache_scales import read_scales

GROWTH_TOKENS = 64  # room made at once while decoding; dequantizing costs as much as copying, so rarely copying is enough
LAYER_TYPES = ("full_attention", "sliding_attention")


class Int8Vectors:
    """The keys or the values of one layer: int8 [rows, heads, tokens, head_dim] and their scales, with room to append.

    `fixed_scale` is fp32 [heads], or None for a scale of each vector.
    """

    def __init__(self, fixed_scale: torch.Tensor | None, like: torch.Tensor) -> None:
        """`like`: [rows, heads, any, head_dim], on the device and in the dtype that vectors come in and go out."""
        rows, heads, _, head_dim = like.shape
        self.dtype, self.length = like.dtype, 0
        self.quantized = torch.empty(rows, heads, 0, head_dim, dtype=torch.int8, device=like.device)
        self.fixed_scale = None if fixed_scale is None else fixed_scale.to(like.device).view(heads, 1, 1)
        self.scales = torch.empty(rows, heads, 0, 1, dtype=torch.float32, device=like.device) if fixed_scale is None else None

    def append(self, vectors: torch.Tensor) -> torch.Tensor:
        """Store `vectors` [rows, heads, n, head_dim]; returns all that are stored, dequantized."""
        first, self.length = self.length, self.length + vectors.shape[-2]
        if self.length > self.quantized.shape[-2]:
            room = self.length - first if first == 0 else max(self.length - first, GROWTH_TOKENS)  # a prompt is stored without slack
            self._apply(lambda stored: torch.cat([stored[:, :, :first], stored.new_empty(*stored.shape[:2], room, stored.shape[3])], 2))
        scale = absmax_scale(vectors) if self.fixed_scale is None else self.fixed_scale
        self.quantized[:, :, first : self.length] = quantize(vectors, scale)
        if self.scales is not None:
            self.scales[:, :, first : self.length] = scale
            scale = self.scales[:, :, : self.length]
        return dequantize(self.quantized[:, :, : self.length], scale, self.dtype)

    def keep(self, first: int, last: int) -> None:
        """Only the tokens [first, last), and no room beside them."""
        if (first, last) != (0, self.quantized.shape[-2]):
            self._apply(lambda stored: stored[:, :, first:last].clone())
        self.length = last - first

    def select_rows(self, index: torch.Tensor) -> None:
        self._apply(lambda stored: stored.index_select(0, index.to(stored.device)))

    def repeat_rows(self, repeats: int) -> None:
        self._apply(lambda stored: stored.repeat_interleave(repeats, dim=0))

    @property
    def nbytes(self) -> int:
        """Of the memory held, room to append included. Fixed scales, which do not grow with the text, are not counted."""
        held = [self.quantized] if self.scales is None else [self.quantized, self.scales]
        return sum(stored.untyped_storage().nbytes() for stored in held)

    def _apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.quantized = change(self.quantized)
        if self.scales is not None:
            self.scales = change(self.scales)


class Int8Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One decoder layer's share of an Int8Cache. With a `window` it keeps the last window - 1 tokens, which is all that the next needs."""

    is_compileable = False
    is_croppable = True

    def __init__(self, window: int | None, key_scale: torch.Tensor | None, value_scale: torch.Tensor | None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.fixed_scales = (key_scale, value_scale)
        self.stored: tuple[Int8Vectors, Int8Vectors] | None = None  # keys and values; None before the first call
        self.seen = 0  # tokens, also those that have left the window
        self.record_past = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        key_scale, value_scale = self.fixed_scales
        self.stored = Int8Vectors(key_scale, key_states), Int8Vectors(value_scale, value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [rows, kv_heads, n, head_dim] each; returns the dequantized keys and values of all tokens that these may look at."""
        if self.stored is None:
            self.lazy_initialization(key_states, value_states)
        assert self.stored is not None
        keys, values = self.stored[0].append(key_states), self.stored[1].append(value_states)
        self.seen += key_states.shape[-2]
        if not self.record_past:
            self._keep(self.length)
        return keys, values

    def _keep(self, last: int) -> None:
        """The tokens before position `last` of those stored, as many as the window asks for."""
        assert self.stored is not None
        first = 0 if self.window is None else max(0, last - (self.window - 1))
        if self.window is None and last == self.length:
            return  # the room to append stays
        for vectors in self.stored:
            vectors.keep(first, last)

    @property
    def length(self) -> int:
        """Tokens that are stored."""
        return self.stored[0].length if self.stored else 0

    @property
    def nbytes(self) -> int:
        return sum(vectors.nbytes for vectors in self.stored) if self.stored else 0

    @property
    def bytes_per_token(self) -> float:
        """Of one sequence. 0 for an empty cache."""
        return self.nbytes / (self.stored[0].quantized.shape[0] * self.length) if self.stored and self.length else 0.0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that `update` will return, position of the first) for a call with `query_length` new ones."""
        kept = self.seen if self.window is None else min(self.seen, self.window - 1)
        return kept + query_length, self.seen - kept

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop`, which may bring them back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. ValueError where the window has already let go of what would come back."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        left = self.seen + tokens_to_remove
        needed = left if self.window is None else min(left, self.window - 1)
        if left < 0 or self.length + tokens_to_remove < needed:
            raise ValueError(
                f"crop({tokens_to_remove}): {self.length} tokens of {self.seen} are still stored, too few to go back so far; "
                "call activate_past_recording() before they are added"
            )
        if self.stored is not None:
            self._keep(self.length + tokens_to_remove)
            self.seen = left

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for vectors in self.stored or ():
            vectors.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for vectors in self.stored or ():
            vectors.repeat_rows(repeats)

    def reset(self) -> None:
        """Empty, as it was made; the memory is given back."""
        self.stored, self.seen, self.is_initialized = None, 0, False


class Int8Cache(Cache):  # type: ignore[misc]  # transformers has no types
    """`past_key_values` of a model with `config`, stored as `settings` say. `scales` are those of a `static` cache (`read_scales`).

    ValueError for layers that keep something else than keys and values of all tokens or of a sliding window, and for scales that are
    missing or have no use.
    """

    def __init__(self, config: Any, settings: CacheSettings, scales: Mapping[str, torch.Tensor] | None = None) -> None:
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        others = sorted(set(kinds) - set(LAYER_TYPES))
        if others:
            raise ValueError(f"an INT8 cache stores {' and '.join(LAYER_TYPES)}, but the model's config.json has {', '.join(others)}")
        if (settings.mode == "static") != (scales is not None):
            raise ValueError(f"a cache of mode {settings.mode} {'needs its' if scales is None else 'has no'} calibrated scales")
        scales, windows = scales or {}, {"sliding_attention": options.get("sliding_window")}
        layers = [
            Int8Layer(windows.get(kind), scales.get(f"layers.{i}.k_scale"), scales.get(f"layers.{i}.v_scale"))
            for i, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)
        self.settings = settings

    @property
    def nbytes(self) -> int:
        """Memory held by quantized values and their scales, measured."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> float:
        """Measured, of one sequence over all layers: that of the spec right after a prompt, more while room for GROWTH_TOKENS is open."""
        return float(sum(layer.bytes_per_token for layer in self.layers))

    @property
    def bytes_per_sequence(self) -> float:
        """Measured, of all tokens that are stored of one sequence."""
        return float(sum(layer.bytes_per_token * layer.length for layer in self.layers))


def load_cache(folder: Path, config: Any) -> Int8Cache | None:
    """An empty cache as the checkpoint's `kv_cache.json` asks for; None where there is no such file. ValueError where it makes no sense."""
    settings = read_cache(folder)
    if settings is None:
        return None
    text = config.get_text_config(decoder=True)
    scales = read_scales(folder, text.num_hidden_layers, text.num_key_value_heads) if settings.mode == "static" else None
    return Int8Cache(config, settings, scales)
