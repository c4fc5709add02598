"""How fast and how dear a served model would be, at most: the roofline's bounds for one load, and sentences that say them. Example:

found = speed(spec, target, context=32768, batch=8)
found.decode_tokens_per_second, found.bound        # of all sequences together; 'bandwidth': reading takes longer than computing
"""

from typing import Literal

from pipeline.layout import Frozen
from pipeline.roofline import (
    crossover_batch,
    decode_bound,
    decode_seconds_per_token,
    decode_work,
    dollars,
    prefill_tokens_per_second,
    ridge,
)
from pipeline.spec import ModelSpec
from pipeline.target import Target


class Speed(Frozen):
    """Bounds for `batch` sequences of `context` tokens; engines come near them from above in time, from below in tokens/s.

    `intensity` and `ridge` are FLOP per byte of a decode step, and from where the target's compute binds it; `crossover_batch` is the
    batch at which it does (None: at no batch). Dollars are per million decoded tokens (None: the target has no price).
    """

    context: int
    batch: int
    decode_seconds: float  # between two tokens of a sequence
    decode_tokens_per_second: float
    bound: Literal["bandwidth", "compute"]
    intensity: float
    ridge: float
    crossover_batch: float | None
    prefill_tokens_per_second: float
    dollars_per_million_tokens: float | None

    def sentences(self) -> list[str]:
        price = "" if self.dollars_per_million_tokens is None else f", ${self.dollars_per_million_tokens:.2f} per million"
        later = "compute does at no batch, for each sequence brings a cache to read"
        if self.crossover_batch is not None:
            later = f"compute does from batch {self.crossover_batch:.0f}"
        why = (
            f"bandwidth binds it ({self.intensity:.0f} FLOP/byte, the ridge is at {self.ridge:.0f}); {later}"
            if self.bound == "bandwidth"
            else f"compute binds it ({self.intensity:.0f} FLOP/byte, above the ridge at {self.ridge:.0f})"
        )
        return [
            f"at most {self.decode_tokens_per_second:,.0f} tokens/s decoded at that load, {1000 * self.decode_seconds:.0f} ms a token"
            f"{price}: {why}; at most {self.prefill_tokens_per_second:,.0f} tokens/s of prompt read"
        ]


def speed(spec: ModelSpec, target: Target, context: int, batch: int) -> Speed | None:
    """None where the target states no FLOP/s or no bandwidth."""
    step, edge = decode_seconds_per_token(spec, target, context, batch), ridge(target)
    bound, prefill = decode_bound(spec, target, context, batch), prefill_tokens_per_second(spec, target, context)
    if step is None or edge is None or bound is None or prefill is None:
        return None
    work = decode_work(spec, context, batch)
    return Speed(
        context=context,
        batch=batch,
        decode_seconds=step,
        decode_tokens_per_second=batch / step,
        bound=bound,
        intensity=work.flops / work.nbytes,
        ridge=edge,
        crossover_batch=crossover_batch(spec, target, context),
        prefill_tokens_per_second=prefill,
        dollars_per_million_tokens=dollars(1e6 * step / batch, target),
    )
