"""Put weights of a checkpoint to zero while it streams by, one decoder layer in memory at a time.

By magnitude, each weight is read, masked and written. Calibrated, each layer sees the calibration text as the pruned layers before it
hand it on: its inputs are gathered in one forward, its weights pruned, and a second forward computes what the next layer sees.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.hooks import RemovableHandle

from pipeline.spec import ModelSpec
from stages.functional.sparsity import add_products, add_squares, inverse_factor, magnitude_mask, sparsegpt, wanda_mask
from stages.runtime.layerwise import LayerwiseModel, micro_batches
from stages.runtime.sparsity_settings import SHARED_INPUTS
from stages.runtime.tensors import DTYPES, CheckpointWriter, TensorReader

Count = Callable[[tuple[int, ...]], int | None]  # of a weight's shape: how many of it go, a multiple of its rows; None: 2:4
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Method:
    """Of a calibrated pruning: what is gathered of a layer's inputs, what is made of that once, and what it does to each weight."""

    gather: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]  # (sum so far, inputs [tokens, columns]) -> sum
    settle: Callable[[torch.Tensor], torch.Tensor]  # torch.linalg.LinAlgError where the sum has no inverse
    prune: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (weight [rows, columns], what is settled) -> weight


def wanda(count: Count) -> Method:
    def prune(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        whole = count(weight.shape)
        return weight.masked_fill(wanda_mask(weight, norms, None if whole is None else whole // len(weight)), 0)

    return Method(add_squares, torch.sqrt, prune)


def sparse_gpt(count: Count, block_size: int, dampening_frac: float) -> Method:
    def settle(hessian: torch.Tensor) -> torch.Tensor:
        return inverse_factor(hessian, dampening_frac)

    def prune(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return sparsegpt(weight, factor, count(weight.shape), block_size)

    return Method(add_products, settle, prune)


def prune_by_magnitude(folder: Path, output: Path, spec: ModelSpec, count: Count, progress: Progress) -> None:
    """Write to `output` the checkpoint `folder`, which `spec` describes. `progress` counts tensors. ValueError for nan or inf."""
    reader = TensorReader(folder)
    sparse = {f"{name}.weight" for group in spec.sparse_groups for name in group.module_names}
    tensors = spec.tensors()
    with CheckpointWriter(output, tensors) as writer:
        for done, name in enumerate(tensors, 1):
            if name in sparse:
                weight = reader.read(name)
                if not weight.isfinite().all():
                    raise ValueError(f"{folder}: {name} holds nan or inf; the checkpoint is damaged, copy it again")
                writer.add(name, weight.masked_fill_(magnitude_mask(weight, count(weight.shape)), 0))
            else:
                writer.copy(name, reader)
            progress(done, len(tensors))


def prune_calibrated(
    folder: Path,
    output: Path,
    windows: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    method: Method,
    progress: Progress,
) -> None:
    """Write to `output` the checkpoint `folder`, calibrated on `windows` [N, T] of token ids in `dtype`. `progress` counts layers.

    ValueError where a layer's inputs are not finite, or their Hessian cannot be inverted.
    """
    model, gathered = LayerwiseModel(folder, dtype, device), dict[str, torch.Tensor]()

    stored = DTYPES[model.spec.dtype]

    def on_layer(_: int, layer: torch.nn.Module) -> list[RemovableHandle]:
        def gather_for(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
                gathered[name] = method.gather(gathered.get(name), inputs[0].flatten(0, -2))

            return hook

        return [layer.get_submodule(names[0]).register_forward_pre_hook(gather_for(names[0])) for names in SHARED_INPUTS]

    def revise(i: int, layer: torch.nn.Module) -> None:
        if not all(statistic.isfinite().all() for statistic in gathered.values()):
            raise ValueError(f"{folder}: inputs of layer {i} are nan or infinite; its weights are damaged or {model.dtype} overflows")
        for names in SHARED_INPUTS:
            try:
                settled = method.settle(gathered.pop(names[0]))
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there
                raise ValueError(
                    f"dampening_frac: the Hessian of model.layers.{i}.{names[0]} has no inverse; raise dampening_frac or num_samples"
                ) from None
            for name in names:
                weight = layer.get_parameter(f"{name}.weight")
                weight.copy_(method.prune(weight, settled).to(stored))  # the next layer sees what is stored
        state = layer.state_dict()
        for name in layers[i]:
            writer.add(name, state[name.removeprefix(f"model.layers.{i}.")].to("cpu", stored))
        progress(i + 1, len(model.layers))

    tensors = model.spec.tensors()
    outside = [name for name in tensors if not name.startswith("model.layers.")]
    layers = [[name for name in tensors if name.startswith(f"model.layers.{i}.")] for i in range(len(model.layers))]
    with CheckpointWriter(output, {name: tensors[name] for name in itertools.chain(outside, *layers)}) as writer:
        for name in outside:
            writer.copy(name, model.reader)
        model.sweep(micro_batches(windows), on_layer=on_layer, revise=revise)
