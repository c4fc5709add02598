"""Cut a checkpoint smaller while it streams by: each layer is read once, scored, gathered and written.

The matrices of one layer are held at a time, in buffers that the next layer uses again; fresh pages would cost more than
the copying itself. What is kept of them, and what is not cut, goes to the file through a buffer of a cache's size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.architecture import Architecture
from pipeline.spec import ModelSpec
from stages.functional.importance import (
    gather_columns,
    head_magnitude,
    highest,
    kept_groups,
    kept_queries,
    neuron_magnitude,
    rows_of_heads,
)
from stages.runtime.inspection import BLOCK_BYTES
from stages.runtime.tensors import CheckpointWriter, TensorReader

LAYERS = "model.layers."

# The tensors of a layer that are cut: (along which dimension, of which units). Norms, and the biases of what writes into the
# residual stream (o_proj, down_proj), keep their shape.
ATTENTION = {
    "self_attn.q_proj.weight": (0, "query"), "self_attn.q_proj.bias": (0, "query"),
    "self_attn.k_proj.weight": (0, "kv"), "self_attn.k_proj.bias": (0, "kv"),
    "self_attn.v_proj.weight": (0, "kv"), "self_attn.v_proj.bias": (0, "kv"),
    "self_attn.o_proj.weight": (1, "query"),
}  # fmt: skip
MLP = {
    "mlp.gate_proj.weight": (0, "neuron"), "mlp.gate_proj.bias": (0, "neuron"),
    "mlp.up_proj.weight": (0, "neuron"), "mlp.up_proj.bias": (0, "neuron"),
    "mlp.down_proj.weight": (1, "neuron"),
}  # fmt: skip


@dataclass
class Pruner:
    """Writes `source`, cut from architecture `old` to `new`, tensor by tensor.

    `head_scores` [layers, heads] and `neuron_scores` [layers, I] decide what stays; where they are None, weight magnitude does.
    """

    source: TensorReader
    old: Architecture
    new: Architecture
    heads: Literal["groups", "queries"]
    head_scores: torch.Tensor | None = None
    neuron_scores: torch.Tensor | None = None
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path, kept_layers: list[int], progress: Callable[[int, int], None]) -> None:
        """Write the weights of the pruned model. `progress` takes layers done and layers in all."""
        known = ModelSpec.of(self.old).tensors()  # leaves out what old savers left: rotary buffers, a tied copy of the embedding
        outside = [name for name in self.source.table if name in known and not name.startswith(LAYERS)]
        layer = [name.removeprefix(f"{LAYERS}0.") for name in known if name.startswith(f"{LAYERS}0.")]
        parts, tensors = self._parts(layer), ModelSpec.of(self.new).tensors()
        order = outside + [f"{LAYERS}{i}.{name}" for i in range(len(kept_layers)) for part in parts for name in part]
        with CheckpointWriter(folder, {name: tensors[name] for name in order}) as writer, one_thread():
            for name in outside:
                writer.copy(name, self.source)
            for new, old in enumerate(kept_layers):
                progress(new, len(kept_layers))
                self._write_layer(writer, parts, old, new)
        progress(len(kept_layers), len(kept_layers))

    def _parts(self, names: list[str]) -> tuple[list[str], list[str], list[str]]:
        """A layer's tensors in the order they are written in: those that are copied, and what is cut of the attention and of the MLP."""
        attention = [name for name in names if name in ATTENTION and self.new.num_heads < self.old.num_heads]
        mlp = [name for name in names if name in MLP and self.new.intermediate_size < self.old.intermediate_size]
        return [name for name in names if name not in (*attention, *mlp)], attention, mlp

    def _write_layer(self, writer: CheckpointWriter, parts: tuple[list[str], list[str], list[str]], old: int, new: int) -> None:
        source, target = f"{LAYERS}{old}.", f"{LAYERS}{new}."
        copied, attention, mlp = parts
        for name in copied:
            writer.copy(target + name, self.source, source + name)
        for names, choose in ((attention, self._choose_heads), (mlp, self._choose_neurons)):
            weights = {name: self._read(source, name) for name in names}
            kept = choose(old, weights) if weights else {}
            for name, weight in weights.items():
                dimension, units = (ATTENTION | MLP)[name]
                shape = cut_shape(weight, dimension, kept[units])
                writer.add_rows(target + name, self.old.dtype, shape, gathered(weight, dimension, kept[units]))

    def _choose_heads(self, layer: int, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows to keep of the query and of the key and value projections."""
        a = self.old
        if self.head_scores is not None:
            scores = self.head_scores[layer]
        else:
            query, key, value, output = (weights[f"self_attn.{name}_proj.weight"] for name in "qkvo")
            scores = head_magnitude(query, key, value, output, a.num_heads, a.num_kv_heads, a.qk_norm)
        if self.heads == "groups":
            queries, groups = kept_groups(scores, a.num_kv_heads, self.new.num_kv_heads)
        else:
            queries, groups = kept_queries(scores, a.num_kv_heads, self.new.num_heads), torch.arange(a.num_kv_heads)
        return {"query": rows_of_heads(queries, a.head_dim), "kv": rows_of_heads(groups, a.head_dim)}

    def _choose_neurons(self, layer: int, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.neuron_scores is not None:
            scores = self.neuron_scores[layer]
        else:
            scores = neuron_magnitude(*(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        return {"neuron": highest(scores, self.new.intermediate_size)}

    def _read(self, prefix: str, name: str) -> torch.Tensor:
        self._buffers[name] = self.source.read(prefix + name, out=self._buffers.get(name))
        return self._buffers[name]


def cut_shape(weight: torch.Tensor, dimension: int, kept: torch.Tensor) -> list[int]:
    return [len(kept) if d == dimension else size for d, size in enumerate(weight.shape)]


def gathered(weight: torch.Tensor, dimension: int, kept: torch.Tensor) -> Iterator[torch.Tensor]:
    """The kept rows, or all rows of the kept columns, some at a time in one buffer: it stays in the core's cache until it is written."""
    shape = cut_shape(weight, dimension, kept)
    step = max(1, BLOCK_BYTES // (weight.itemsize * math.prod(shape[1:])))
    buffer = torch.empty([min(step, shape[0]), *shape[1:]], dtype=weight.dtype)
    for first in range(0, shape[0], step):
        out = buffer[: min(step, shape[0] - first)]
        if dimension == 0:
            yield torch.index_select(weight, 0, kept[first : first + step], out=out)
        else:
            yield gather_columns(weight[first : first + step], kept, out)


@contextmanager
def one_thread() -> Iterator[None]:
    """For work on blocks of a cache's size: torch would share out each, which costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pruned_config(config: Mapping[str, Any], new: Architecture, kept_layers: list[int]) -> dict[str, Any]:
    """The source's config.json with the new sizes, everything else (rope scaling, token ids, ...) as it was."""
    result = dict(config) | {
        "model_type": new.model_type,
        "num_hidden_layers": new.num_layers,
        "num_attention_heads": new.num_heads,
        "num_key_value_heads": new.num_kv_heads,
        "head_dim": new.head_dim,
        "intermediate_size": new.intermediate_size,
    }
    if new.model_type != config["model_type"]:
        result |= mistral_settings(config)
        for llama_only in ("attention_bias", "mlp_bias", "pretraining_tp"):
            result.pop(llama_only, None)
    if len(kept_layers) < config["num_hidden_layers"] and (types := layer_types(config)):
        result["layer_types"] = [types[i] for i in kept_layers]
    return result


def mistral_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a Mistral model of these Llama settings: the architectures differ in the defaults of their configs only."""
    return {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
    }


def layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """Attention type of each layer, as Qwen's configs say it or imply it; None where all layers are alike."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return None
    first = config.get("max_window_layers", 28)
    return ["sliding_attention" if i >= first else "full_attention" for i in range(config["num_hidden_layers"])]
