"""The widths of a model whose layers are stored at different bits: a row for each kind of layer, a column for each decoder layer."""

from pipeline.layout import Frozen, ModuleGroup
from pipeline.spec import ModelSpec


class LayerBits(Frozen):
    """One kind of Linear layer. `bits` by decoder layer, of the head one number; None: dense, or there is none in that layer."""

    kind: str  # such as `self_attn.q_proj`
    bits: tuple[int | None, ...]


def layer_bits(spec: ModelSpec) -> tuple[LayerBits, ...]:
    """Empty where all packed layers have the same width, and of experts, of which a layer has many."""
    linear = [group for group in spec.linear_groups if not group.experts]
    if len({group.format.num_bits for group in linear} - {None}) < 2:
        return ()
    found: dict[str, dict[int, int | None]] = {}
    for group in linear:
        found.setdefault(_kind(group), {}).update(dict.fromkeys(group.layers or (0,), group.format.num_bits))
    packed = {kind: bits for kind, bits in found.items() if any(bits.values())}
    return tuple(LayerBits(kind=kind, bits=tuple(bits.get(n) for n in range(max(bits) + 1))) for kind, bits in packed.items())


def _kind(group: ModuleGroup) -> str:
    return group.name.removeprefix("model.layers.{layer}.")
