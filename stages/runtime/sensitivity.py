"""What rounding one unit of a model costs, unit by unit and width by width: the divergence of its outputs from those of the model itself.

All variants of a model run in one sweep over its layers. A variant begins at the layer of its unit: that layer is given the model's own
hidden states and the rounded weights, and from there on the variant's hidden states are carried along beside the model's. So what
comes before a unit is computed once for all, and a layer is read once for as many variants as are carried at a time:

    layer 0     the model, and each width of each unit of layer 0
    layer 1     the model, the variants so far, and each width of each unit of layer 1      ... and so on; then the head, for all of them

Weights are rounded as round-to-nearest would store them, bit for bit.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch.nn import functional

from pipeline.artifact_spec import SensitivitySpec
from pipeline.layout import WeightFormat
from pipeline.stage import Context
from stages.functional.losses import kl_of
from stages.runtime.layerwise import LayerwiseModel
from stages.runtime.mixed_bits import Units, layer_of
from stages.runtime.mixed_precision import form_of
from stages.runtime.packing import min_max_parameters, scheme_of
from stages.runtime.tensors import DTYPES
from stages.runtime.windows import chunk_tokens

PARTIAL_FILE = "measured.json"  # of the units that are done, while others are not


class Variant(NamedTuple):
    """A model of which one unit is rounded."""

    unit: str
    form: WeightFormat


Progress = Callable[[int], None]  # layers of one variant, or the head, that were computed


def measure(
    ctx: Context, model: LayerwiseModel, units: Units, asked: SensitivitySpec, batches: Sequence[torch.Tensor], at_once: int
) -> tuple[tuple[float, ...], ...]:
    """The divergence of each unit at each of the choices, [units][choices], on token ids [windows, length] in batches.

    What is measured of a sweep is kept in `ctx.output`, and taken from there after an interruption. ValueError where the model computes
    nan or inf.
    """
    forms = [form_of(asked, bits) for bits in asked.choices]
    file, layers = ctx.output / PARTIAL_FILE, len(model.layers)
    known: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if known:
        ctx.resumed(f"{len(known)} of {len(units)} units were measured")
    groups = list(groups_of([Variant(unit, form) for unit in units if unit not in known for form in forms], at_once))
    parts = [len(batches) * (sum(layers - layer_of(units[variant.unit], layers) for variant in group) + len(group)) for group in groups]
    done = 0

    def progress(computed: int) -> None:
        nonlocal done
        done += computed
        ctx.progress("measuring", done, sum(parts))

    for group in groups:
        found = Sweep(model, units, group, progress).divergences(batches)
        for variant, divergence in found.items():
            if not math.isfinite(divergence):
                raise ValueError(
                    f"rounding {variant.unit} to {variant.form.num_bits} bits makes the model compute nan or inf; evaluate it first"
                )
        known |= {unit: [found[Variant(unit, form)] for form in forms] for unit in dict.fromkeys(variant.unit for variant in group)}
        _keep(file, known)
    file.unlink()
    return tuple(tuple(known[unit]) for unit in units)


def _keep(file: Path, known: dict[str, list[float]]) -> None:
    """In one step: an interruption leaves the old content or the new."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(known), encoding="utf-8")
    partial.replace(file)


def rounded(weight: torch.Tensor, form: WeightFormat, stored: torch.dtype) -> torch.Tensor:
    """[rows, columns] of a weight whose file holds it in dtype `stored`, to what reading it back in that format gives in its own dtype."""
    own, args = weight.to(stored), scheme_of(form).weights
    scale, zero_point = min_max_parameters(own, form)
    integers = quantize(own, scale, zero_point, args, dtype=torch.int8)
    made: torch.Tensor = dequantize(integers, scale.to(weight.dtype), zero_point, args)
    return made


def groups_of(variants: Sequence[Variant], most: int) -> Iterator[list[Variant]]:
    """Variants that are computed in one sweep, all widths of a unit together; at most `most`, or those of one unit."""
    group: list[Variant] = []
    for unit in dict.fromkeys(variant.unit for variant in variants):
        own = [variant for variant in variants if variant.unit == unit]
        if group and len(group) + len(own) > most:
            yield group
            group = []
        group += own
    if group:
        yield group


class Sweep:
    """One sweep over a model, with variants carried along. `units` are the modules of each unit, by name."""

    def __init__(self, model: LayerwiseModel, units: Units, variants: Sequence[Variant], progress: Progress) -> None:
        self.model, self.units, self.progress = model, units, progress
        self.stored = DTYPES[model.spec.dtype]
        self.born: dict[int, list[Variant]] = {}
        for variant in variants:
            self.born.setdefault(layer_of(units[variant.unit], len(model.layers)), []).append(variant)
        self.states: dict[Variant, dict[int, torch.Tensor]] = {variant: {} for variant in variants}  # by batch, on the CPU
        self._arguments: dict[torch.Size, list[dict[str, object]]] = {}

    @torch.no_grad()
    def divergences(self, batches: Sequence[torch.Tensor]) -> dict[Variant, float]:
        """KL(model || variant) in nats, mean over every position of the token ids [windows, length] of each batch."""
        hidden = self.model.sweep(batches, on_output=self._carry)
        self.model.normalize([state for states in self.states.values() for state in states.values()])
        return self._compare(hidden)

    def _carry(self, index: int, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Batch `number` through layer `index`: in the variants that began earlier, and in those that begin here."""
        layer = self.model.layers[index]
        if before.shape not in self._arguments:
            self._arguments[before.shape] = self.model.layer_arguments(before)
        arguments = self._arguments[before.shape][index]
        for states in self.states.values():
            if number in states:
                states[number].copy_(layer(states[number].to(self.model.device), **arguments))
                self.progress(1)
        for variant in self.born.get(index, ()):
            weights = self._round(layer, index, variant)
            try:
                self.states[variant][number] = layer(before, **arguments).to("cpu", copy=True)
            finally:
                for parameter, weight in weights:
                    parameter.data = weight
            self.progress(1)

    def _round(self, layer: torch.nn.Module, index: int, variant: Variant) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Replaces the weights of the variant's unit; returns what they were."""
        before = []
        for module in self.units[variant.unit]:
            parameter = layer.get_parameter(f"{module.removeprefix(f'model.layers.{index}.')}.weight")
            before.append((parameter, parameter.data))
            parameter.data = rounded(parameter.data, variant.form, self.stored)
        return before

    def _compare(self, hidden: Sequence[torch.Tensor]) -> dict[Variant, float]:
        """Of the model's hidden states, [windows, length, hidden size] by batch, with those of every variant."""
        head, device = self.model.output_embedding(), self.model.device
        heads = {variant: rounded(head, variant.form, self.stored) for variant in self.born.get(len(self.model.layers), ())}
        sums, tokens = dict.fromkeys(self.states, 0.0), 0
        for number, own in enumerate(hidden):
            for chunk in torch.split(torch.arange(own.shape[0] * own.shape[1]), chunk_tokens(len(head))):
                part = own.flatten(0, 1)[chunk].to(device)
                log_p = functional.linear(part, head).float().log_softmax(-1)
                for variant, states in self.states.items():
                    seen = states[number].flatten(0, 1)[chunk].to(device) if states else part
                    log_q = functional.linear(seen, heads.get(variant, head)).float().log_softmax(-1)
                    sums[variant] += kl_of(log_p, log_q).sum(dtype=torch.float64).item()
                tokens += len(chunk)
            self.progress(len(self.states))
        return {variant: total / tokens for variant, total in sums.items()}
