"""The settings of a quantizer that gives each layer its own bits, and what follows from them. Needs no torch: a plan reads it.

    quantize: {mixed_precision: {budget_bits: 4.5, choices: [3, 4, 8]}, inputs: {sensitivity: sensitivity}}

The stage `sensitivity` measured what each unit of layers loses at each width (stages/sensitivity.py). Here those widths are chosen of
which the losses add up to least, among all that take at most `budget_bits` per weight. No layer is favoured for its place.

Before the measurement nobody knows which layer gets what. Then a plan takes the widths that fill the budget best: no choice within
it takes more bytes, so that what it says is a bound, and a tight one.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.artifact_spec import SensitivitySpec
from pipeline.layout import Frozen, WeightFormat
from pipeline.spec import ModelSpec
from stages.runtime.mixed_bits import assign, mean_bits, unit_sizes, units_of
from stages.runtime.scheme import SERVED_BITS, WeightQuantization

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
ASSIGNMENT_FILE = "mixed_precision.json"


def several(choices: tuple[Bits, ...]) -> tuple[Bits, ...]:
    """Rising. ValueError where there is nothing to choose from."""
    if len(set(choices)) < 2:
        raise ValueError("one width is nothing to choose from; write two or more, or num_bits instead of mixed_precision")
    if len(set(choices)) < len(choices):
        raise ValueError("a width stands in it twice; write each once")
    return tuple(sorted(choices))


class MixedPrecision(Frozen):
    budget_bits: float = Field(gt=0, le=16)  # per weight of the quantized layers, scales and zero points counted: at most
    choices: tuple[Bits, ...] = (3, 4, 5, 8)  # widths that a layer may have

    _several = field_validator("choices")(several)


class MixedPrecisionParams(WeightQuantization):
    mixed_precision: MixedPrecision | None = None  # None: every layer has `num_bits`

    @model_validator(mode="after")
    def _num_bits_has_an_effect(self) -> "MixedPrecisionParams":
        if self.mixed_precision and self.num_bits != type(self).model_fields["num_bits"].default:
            raise ValueError(f"num_bits {self.num_bits} has no effect beside mixed_precision, whose choices are the widths; leave it out")
        return self

    @property
    def unused_ports(self) -> frozenset[str]:
        return frozenset() if self.mixed_precision else frozenset({"sensitivity"})

    def quantized(self, model: ModelSpec, sensitivity: SensitivitySpec | None) -> ModelSpec:
        """The quantized model's spec, or the largest that it can be where `sensitivity` is not measured yet.

        ValueError as of `apply`, and where the budget cannot be met or leaves nothing to choose, or something else was measured.
        """
        uniform = self.apply(model)
        if self.mixed_precision is None:
            return uniform
        if sensitivity is None:
            raise ValueError(
                "mixed_precision: it needs to know what rounding each layer costs; put a stage `sensitivity` before it and write "
                "inputs: {sensitivity: sensitivity}"
            )
        return _mixed(uniform, self.mixed_precision, sensitivity)

    def explain_mixed(self, model: ModelSpec, sensitivity: SensitivitySpec | None) -> list[str]:
        """As `explain`, of the widths that were chosen."""
        mixed = self.mixed_precision
        if mixed is None or sensitivity is None:
            return self.explain()
        unserved = [bits for bits in mixed.choices if bits not in SERVED_BITS]
        said = (
            [f"choices {_listed(unserved)}: vLLM's usual kernels take 4 and 8 bits; others need its newest ones, see run mode=check"]
            if unserved
            else []
        )
        uniform = self.apply(model)
        if sensitivity.divergence is None:
            bits = Assignment.of(uniform, mixed, sensitivity).bits_per_weight
            return [*said, f"sizes are the most that the budget allows ({bits:.3f} bits per weight), until the sensitivity is measured"]
        return [*said, *Assignment.of(uniform, mixed, sensitivity).sentences()]


class Assignment(Frozen):
    """`mixed_precision.json`: the width of each unit.

    Divergences are sums over the units of what each costs alone, in nats per token; `uniform_divergence` of every unit at the same width.
    """

    budget_bits: float
    bits_per_weight: float  # of the quantized layers, scales and zero points counted
    divergence: float | None
    uniform_divergence: dict[int, float]
    bits: dict[str, int]  # by unit
    modules: dict[str, tuple[str, ...]]  # by unit

    @classmethod
    def of(cls, packed: ModelSpec, mixed: MixedPrecision, measured: SensitivitySpec) -> "Assignment":
        """`packed`: the model with all layers packed that are to be. ValueError as of `quantized`."""
        return _assignment(packed, mixed, measured)

    def sentences(self) -> list[str]:
        said = [f"{self.bits_per_weight:.3f} of {self.budget_bits:g} bits per weight: {_by_kind(self.bits)}"]
        if self.divergence is not None:
            alike = ", ".join(f"{value:.3g} with {bits} bits everywhere" for bits, value in self.uniform_divergence.items())
            said.append(f"alone, the units' rounding adds up to a KL divergence of {self.divergence:.3g}; {alike}")
        return said


def write_assignment(folder: Path, params: MixedPrecisionParams, model: ModelSpec, measured: SensitivitySpec | None) -> None:
    """`mixed_precision.json` beside a checkpoint, where its layers have their own bits."""
    if params.mixed_precision and measured:
        assignment = Assignment.of(params.apply(model), params.mixed_precision, measured)
        (folder / ASSIGNMENT_FILE).write_text(assignment.model_dump_json(indent=1) + "\n", encoding="utf-8")


@cache
def _mixed(packed: ModelSpec, mixed: MixedPrecision, measured: SensitivitySpec) -> ModelSpec:
    assignment = _assignment(packed, mixed, measured)
    formats = {module: form_of(measured, bits) for unit, bits in assignment.bits.items() for module in assignment.modules[unit]}
    return packed.with_formats(formats)


@cache
def _assignment(packed: ModelSpec, mixed: MixedPrecision, measured: SensitivitySpec) -> Assignment:
    units = units_of(packed, measured.fused)
    _check_measured(packed, tuple(units), mixed, measured)
    forms = tuple(form_of(measured, bits) for bits in mixed.choices)
    sizes = unit_sizes(packed, measured.fused, forms)
    _check_budget(mixed, *(mean_bits((end(row) for row in sizes), packed) for end in (min, max)))
    columns = [measured.choices.index(bits) for bits in mixed.choices]
    costs = None if measured.divergence is None else tuple(tuple(row[column] for column in columns) for row in measured.divergence)
    chosen = assign(packed, measured.fused, forms, mixed.budget_bits, costs)
    return Assignment(
        budget_bits=mixed.budget_bits,
        bits_per_weight=mean_bits((row[choice] for row, choice in zip(sizes, chosen, strict=True)), packed),
        divergence=None if costs is None else sum(row[choice] for row, choice in zip(costs, chosen, strict=True)),
        uniform_divergence={} if costs is None else {bits: sum(row[n] for row in costs) for n, bits in enumerate(mixed.choices)},
        bits={unit: mixed.choices[choice] for unit, choice in zip(units, chosen, strict=True)},
        modules=dict(units),
    )


def form_of(measured: SensitivitySpec, bits: int) -> WeightFormat:
    return WeightFormat(num_bits=bits, group_size=measured.group_size, symmetric=measured.symmetric)


def _check_measured(packed: ModelSpec, units: tuple[str, ...], mixed: MixedPrecision, measured: SensitivitySpec) -> None:
    """ValueError where what was measured is not what is to be decided."""
    missing = [bits for bits in mixed.choices if bits not in measured.choices]
    if missing:
        raise ValueError(
            f"mixed_precision.choices: {_listed(missing)} bits are not among those that were measured, {_listed(measured.choices)}; "
            "write the same choices in the stage sensitivity"
        )
    form = next(group.format for group in packed.linear_groups if not group.format.is_dense)
    for name, mine, its in (("group_size", form.group_size, measured.group_size), ("symmetric", form.symmetric, measured.symmetric)):
        if mine != its:
            raise ValueError(
                f"{name}: {str(mine).lower()} here, but the sensitivity was measured with {str(its).lower()}; write the same in both"
            )
    if units != measured.units:
        unlike = sorted(set(units) ^ set(measured.units))
        raise ValueError(
            f"mixed_precision: the sensitivity is that of other layers ({unlike[0]} and {len(unlike) - 1} more); write the same `ignore` "
            "in both, and measure behind every stage that changes shapes"
        )


def _check_budget(mixed: MixedPrecision, least: float, most: float) -> None:
    """`least`, `most`: bits per weight with the narrowest and the widest choice everywhere."""
    low, high = mixed.choices[0], mixed.choices[-1]
    if mixed.budget_bits <= least + 1e-9:
        less = "less than" if mixed.budget_bits < least - 1e-9 else "no more than"
        raise ValueError(
            f"mixed_precision.budget_bits: {mixed.budget_bits:g} is {less} the {least:.4g} that {low} bits take everywhere, scales "
            f"counted; write more than {least:.4g}, or allow fewer bits in choices"
        )
    if mixed.budget_bits >= most - 1e-9:
        raise ValueError(
            f"mixed_precision.budget_bits: {mixed.budget_bits:g} is enough for {high} bits everywhere, which take {most:.4g}; write less, "
            f"or num_bits: {high} without mixed_precision"
        )


def _by_kind(bits: dict[str, int]) -> str:
    """`qkv_proj 3 bits in 12 layers, 4 in 20; down_proj ...`, or layer by layer where there are few."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for unit, width in bits.items():
        parts = unit.split(".")
        kinds.setdefault(parts[-1], []).append((parts[2] if parts[1:2] == ["layers"] else "", width))
    return "; ".join(f"{kind} {_widths(rows)}" for kind, rows in kinds.items())


def _widths(rows: Sequence[tuple[str, int]]) -> str:
    counts = Counter(width for _, width in rows)
    if len(counts) == 1:
        return f"{rows[0][1]} bits" + (" in all layers" if rows[0][0] else "")
    layers = {width: [int(layer) for layer, own in rows if own == width] for width in sorted(counts)}
    return ", ".join(f"{width} in {_ranges(where)}" for width, where in layers.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`layers 0-3, 7`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    said = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer {said}" if len(numbers) == 1 else f"layers {said}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
