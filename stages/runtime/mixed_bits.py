"""Layers at different bits under one budget: what is decided together, what each decision takes, and which are best. Needs no torch.

A unit is what gets its bits together: a layer, or those that engines compute in one product, named as there (pipeline/fused_products.py):

    model.layers.0.self_attn.qkv_proj   model.layers.0.self_attn.o_proj   model.layers.0.mlp.gate_up_proj   model.layers.0.mlp.down_proj

Bits per weight count packed values, scales and zero points as they stand on disk, so 4 bits symmetric in groups of 128 are 4.125. The 16
bytes of a weight's shape, which are the same at any width, are left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from pipeline.fused_products import product_of
from pipeline.headers import ITEM_BYTES
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from stages.functional.allocation import allocate, largest

HEAD = "lm_head"
CONSTANT = "weight_shape"  # tensors of a packed weight whose size no format changes

Units = Mapping[str, tuple[str, ...]]  # modules by unit, both by name and in the order of the model


@cache
def units_of(packed: ModelSpec, fused: bool) -> Units:
    """The packed modules of a model, a unit each or, `fused`, together with what engines compute in the same product."""
    found: dict[str, list[str]] = {}
    layers, names = packed.architecture.num_layers, packed_modules(packed)
    for module in sorted(names, key=lambda name: layer_of((name,), layers)):  # stable: within a layer as the model has them
        whole = product_of(module) if fused else module
        found.setdefault(whole, []).append(module)
    return {unit: tuple(modules) for unit, modules in found.items()}


def packed_modules(packed: ModelSpec) -> list[str]:
    return [name for group in packed.linear_groups if not group.format.is_dense for name in group.module_names]


def layer_of(modules: Sequence[str], layers: int) -> int:
    """The decoder layer in which a unit lies; the head counts as the one behind the last."""
    return layers if modules[0] == HEAD else int(modules[0].split(".")[2])


@cache
def unit_sizes(packed: ModelSpec, fused: bool, forms: tuple[WeightFormat, ...]) -> tuple[tuple[int, ...], ...]:
    """Bytes of each unit in each format, [units][formats]."""
    shapes = {name: group.shape for group in packed.linear_groups for name in group.module_names}
    sizes = {(shape, form): _size(shape, form, packed.dtype) for shape in set(shapes.values()) for form in forms}
    units = units_of(packed, fused).values()
    return tuple(tuple(sum(sizes[shapes[module], form] for module in modules) for form in forms) for modules in units)


def _size(shape: Sequence[int], form: WeightFormat, dtype: str) -> int:
    table = form.tensors((shape[0], shape[1]), dtype)
    return sum(math.prod(size) * ITEM_BYTES[kind] for suffix, (kind, size) in table.items() if suffix != CONSTANT)


def num_weights(packed: ModelSpec) -> int:
    return sum(group.count * math.prod(group.shape) for group in packed.linear_groups if not group.format.is_dense)


def mean_bits(sizes: Iterable[int], packed: ModelSpec) -> float:
    """Bits per weight of units of these bytes."""
    return 8 * sum(sizes) / num_weights(packed)


@cache
def assign(
    packed: ModelSpec, fused: bool, forms: tuple[WeightFormat, ...], budget_bits: float, costs: tuple[tuple[float, ...], ...] | None
) -> tuple[int, ...]:
    """The format of each unit, an index into `forms`: least total cost within the budget, or where costs are not known the most bytes."""
    sizes = unit_sizes(packed, fused, forms)
    budget = int(budget_bits * num_weights(packed) / 8 + 1e-6)
    return tuple(largest(sizes, budget) if costs is None else allocate(costs, sizes, budget))
