"""What flows through a model on a calibration set: one sweep, layer by layer, gives every activation statistic that pruning uses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from stages.functional.importance import block_influence, head_activation, neuron_activation
from stages.runtime.layerwise import LayerwiseModel, micro_batches


@dataclass(frozen=True)
class ActivationStatistics:
    """Means over the tokens of the calibration set, in fp64."""

    neurons: torch.Tensor  # [layers, I]: |activation| at the input of down_proj
    heads: torch.Tensor  # [layers, heads]: L2 norm of the head's slice of the input of o_proj
    influence: torch.Tensor  # [layers]: 1 - cosine of the layer's input and output


def measure_activations(
    folder: Path,
    windows: torch.Tensor,
    progress: Callable[[int, int], None],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ActivationStatistics:
    """Run the checkpoint over `windows` [N, T] of token ids, computing in `dtype` (default: its own).

    `progress` takes layers done and layers in all.

    ValueError where a layer's activations are not finite: such scores would rank nothing.
    """
    model = LayerwiseModel(folder, dtype, device)
    a = model.spec.architecture
    neurons = torch.zeros(a.num_layers, a.intermediate_size, dtype=torch.float64)
    heads = torch.zeros(a.num_layers, a.num_heads, dtype=torch.float64)
    influence = torch.zeros(a.num_layers, dtype=torch.float64)

    def on_layer(i: int, layer: Any) -> list[RemovableHandle]:
        def add_neurons(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            neurons[i] += neuron_activation(inputs[0])

        def add_heads(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            heads[i] += head_activation(inputs[0], a.head_dim)

        progress(i, a.num_layers)
        return [
            layer.mlp.down_proj.register_forward_pre_hook(add_neurons),
            layer.self_attn.o_proj.register_forward_pre_hook(add_heads),
        ]

    def on_output(i: int, _: int, before: torch.Tensor, after: torch.Tensor) -> None:
        influence[i] += block_influence(before, after)

    model.sweep(micro_batches(windows), on_layer=on_layer, on_output=on_output)
    progress(a.num_layers, a.num_layers)
    for i in range(a.num_layers):
        if not (neurons[i].isfinite().all() and heads[i].isfinite().all() and influence[i].isfinite()):
            raise ValueError(f"{folder}: activations of layer {i} are nan or infinite; its weights are damaged or {model.dtype} overflows")
    tokens = windows.numel()
    return ActivationStatistics(neurons / tokens, heads / tokens, influence / tokens)
