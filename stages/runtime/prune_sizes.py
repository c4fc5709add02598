"""Which smaller sizes of a model are legal, and which of them is meant: integers only, no weights, no torch.

A ratio goes to the nearest legal count. Example: 64 query heads in 8 KV groups can lose whole groups of 8 query heads, so
`head_ratio: 0.2` (51.2 heads kept) means 48 query / 6 KV heads, 25 % removed, and the plan says so.
"""

from dataclasses import dataclass
from math import lcm

from pipeline.architecture import Architecture


@dataclass(frozen=True)
class Axis:
    """One prunable dimension: `size` units, of which any count in `legal` (ascending, all smaller) may be kept."""

    size: int
    legal: tuple[int, ...]
    unit: str
    rule: str  # why other counts are not legal; empty where every count is

    def by_ratio(self, field: str, ratio: float) -> int:
        """The legal count nearest to removing `ratio`; of two equally near the larger. ValueError: nothing or all would go."""
        self._require_legal(field)
        wanted = self.size * (1 - ratio)
        nearest = min((0, *self.legal, self.size), key=lambda count: (round(abs(count - wanted), 9), -count))
        if nearest == self.size:
            step = 1 - self.legal[-1] / self.size
            raise ValueError(f"{field}: {ratio:g} of {self.size} {self.unit} rounds to nothing removed; the smallest step is {step:.4g}")
        if nearest == 0:
            most = 1 - self.legal[0] / self.size
            raise ValueError(f"{field}: {ratio:g} of {self.size} {self.unit} rounds to everything removed; the largest is {most:.4g}")
        return nearest

    def by_count(self, field: str, count: int) -> int:
        """`count` itself where it is legal; else ValueError names the nearest that are."""
        if count >= self.size:
            raise ValueError(f"{field}: {count} removes nothing, the model has {self.size} {self.unit}; write a smaller number")
        self._require_legal(field)
        if count not in self.legal:
            near = [max((n for n in self.legal if n < count), default=0), min((n for n in self.legal if n > count), default=0)]
            choice = " or ".join(str(n) for n in near if n)
            raise ValueError(f"{field}: {count} {self.unit} cannot be, {self.rule}; write {choice}")
        return count

    def _require_legal(self, field: str) -> None:
        if not self.legal:
            raise ValueError(f"{field}: none of the {self.size} {self.unit} can go, {self.rule}")


def group_axis(a: Architecture, group_size: int) -> Axis:
    """Whole KV heads, each with its query heads."""
    width = a.num_heads // a.num_kv_heads * a.head_dim
    legal = tuple(n for n in range(1, a.num_kv_heads) if n * width % group_size == 0)
    rule = f"each holds {width} columns of the attention output, whose width must be divisible by group_size {group_size}"
    return Axis(a.num_kv_heads, legal, "KV heads", rule)


def query_axis(a: Architecture, group_size: int) -> Axis:
    """Query heads, the same number from each group of a KV head."""
    legal = tuple(n for n in range(a.num_kv_heads, a.num_heads, a.num_kv_heads) if n * a.head_dim % group_size == 0)
    rule = (
        f"every one of the {a.num_kv_heads} KV heads must keep equally many, at least one, "
        f"and {a.head_dim} columns each make a width divisible by group_size {group_size}"
    )
    return Axis(a.num_heads, legal, "query heads", rule)


def neuron_axis(a: Architecture, group_size: int, round_to: int) -> Axis:
    """MLP neurons, in multiples of `round_to` that the group size divides too."""
    step = lcm(group_size, round_to)
    rule = f"the width must be a multiple of {step} (round_to {round_to}, group_size {group_size})"
    if round_to == 1:
        rule = f"the width must be divisible by group_size {group_size}"
    return Axis(a.intermediate_size, tuple(range(step, a.intermediate_size, step)), "MLP neurons", rule)


def layer_axis(a: Architecture) -> Axis:
    return Axis(a.num_layers, tuple(range(1, a.num_layers)), "layers", "one has to stay")


def default_round_to(intermediate_size: int) -> int:
    """Multiples of 1024 from a width of 8192 up, where a few rows more cost nothing and kernels like round shapes; else 256."""
    return 1024 if intermediate_size >= 8192 else 256
