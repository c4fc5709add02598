"""The scales of a calibrated (`static`) INT8 cache: found in one sweep over text, kept in `kv_cache.safetensors`.

Calibration runs layer by layer, so it needs the memory of one layer: each attention is handed, in the place of a cache, a
recorder that sees the very tensors a cache would store (keys after their rotary embedding) and gives them back unchanged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.hooks import RemovableHandle

from pipeline.companions import SCALES_FILE
from pipeline.headers import CheckpointFileError, read_header
from pipeline.layout import KVCacheSpec
from stages.functional.int8 import LARGEST
from stages.runtime.layerwise import LayerwiseModel, micro_batches


class AbsmaxRecorder:
    """Largest magnitude of all keys and values that passed, by KV head: fp32 [layers, kv_heads] each."""

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.keys, self.values = torch.zeros(layers, kv_heads), torch.zeros(layers, kv_heads)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """As `Cache.update` in transformers: [rows, kv_heads, tokens, head_dim] each."""
        for largest, states in ((self.keys, key_states), (self.values, value_states)):
            largest[layer] = torch.maximum(largest[layer], states.abs().amax((0, 2, 3)).float().cpu())
        return key_states, value_states


def calibrate_scales(
    folder: Path, windows: torch.Tensor, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> dict[str, torch.Tensor]:
    """The content of `kv_cache.safetensors` for the checkpoint, from text windows [N, T] of token ids: largest magnitude / 127.

    It computes in `dtype`.
    `progress` takes layers done and layers in all. ValueError names a head without finite, nonzero keys or values.
    """
    model = LayerwiseModel(folder, dtype, device)
    cache = model.spec.kv_cache
    recorder = AbsmaxRecorder(cache.layers, cache.kv_heads)

    def on_layer(i: int, layer: Any) -> list[RemovableHandle]:
        progress(i, cache.layers)
        return [layer.self_attn.register_forward_pre_hook(as_cache, with_kwargs=True)]

    def as_cache(_: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, {**keywords, "past_key_values": recorder}

    model.sweep(micro_batches(windows), on_layer=on_layer)
    progress(cache.layers, cache.layers)
    for what, largest in (("keys", recorder.keys), ("values", recorder.values)):
        broken = (~(largest.isfinite() & (largest > 0))).nonzero()
        if len(broken):
            i, head = broken[0].tolist()
            raise ValueError(
                f"mode: the {what} of layer {i}, KV head {head} reach {largest[i, head]:g} on the calibration text, which gives no scale; "
                "write per_token_head, which needs none, or mend the weights"
            )
    named = (("k_scale", recorder.keys), ("v_scale", recorder.values))
    return {f"layers.{i}.{name}": largest[i] / LARGEST for i in range(cache.layers) for name, largest in named}


def write_scales(folder: Path, scales: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(scales), folder / SCALES_FILE)


def read_scales(folder: Path, layers: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """`layers.{i}.k_scale` and `.v_scale`, fp32 [kv_heads] each. CheckpointFileError where the file is not that."""
    problems = scale_problems(folder, KVCacheSpec(layers=layers, kv_heads=kv_heads, head_dim=1, mode="static"))
    if problems:
        raise CheckpointFileError(f"{folder}: {problems[0]}; write it with the stage kv_cache")
    return dict(load_file(folder / SCALES_FILE))


def scale_problems(folder: Path, cache: KVCacheSpec) -> list[str]:
    """How `kv_cache.safetensors` departs from what a cache of that spec needs; a cache that is not `static` needs none."""
    file = folder / SCALES_FILE
    if cache.mode != "static":
        return [f"{SCALES_FILE} is left over: only a static cache has calibrated scales"] if file.exists() else []
    if not file.is_file():
        return [f"{SCALES_FILE} is missing"]
    names = [f"layers.{i}.{name}" for i in range(cache.layers) for name in ("k_scale", "v_scale")]
    table = read_header(file)
    problems = [f"{SCALES_FILE}: {name} is missing" for name in names if name not in table]
    problems += [f"{SCALES_FILE}: {name} is unexpected" for name in table if name not in names]
    problems += [
        f"{SCALES_FILE}: {name} is {entry.dtype} {list(entry.shape)}, expected F32 [{cache.kv_heads}]"
        for name, entry in table.items()
        if name in names and (entry.dtype, entry.shape) != ("F32", (cache.kv_heads,))
    ]
    if problems:
        return problems
    return [
        f"{SCALES_FILE}: {name} holds a scale that is not finite and positive"
        for name, scale in load_file(file).items()
        if not (scale.isfinite() & (scale > 0)).all()
    ]
