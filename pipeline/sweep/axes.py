"""`sweep` of a recipe: the alternatives that `run -m` goes through where the command line does not name others.

    sweep: {order: [[rtn4, evaluate], [gptq4, evaluate]], stages.distill.seed: [0, 1, 2]}

is, under -m, `order=[rtn4,evaluate],[gptq4,evaluate] stages.distill.seed=0,1,2`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

AXIS = re.compile(r"order|probe|gates|requantize|(stage@)?stages\.\w+(\.\w+)*")
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")


def axis_problems(axes: Any) -> Iterator[str]:
    """What is wrong with the `sweep` of a recipe."""
    if not isinstance(axes, Mapping):
        yield "sweep: it is a mapping of what to vary to a list of its values, such as {stages.quantize.num_bits: [4, 3]}"
        return
    for name, values in axes.items():
        if not AXIS.fullmatch(str(name)):
            yield f"sweep.{name}: it is not what a recipe may vary; write order or a setting of a stage, such as stages.quantize.num_bits"
        elif not isinstance(values, list) or len(values) < 2:
            yield f"sweep.{name}: it needs a list of two values or more"


def overrides(axes: Mapping[str, Any], given: Sequence[str]) -> list[str]:
    """The axes as overrides, those left out that are given already. `order` is left to a sweeper over orders where one is chosen."""
    named = {argument.partition("=")[0].lstrip("+~") for argument in given}
    if "hydra/sweeper=orders" in given:
        named.add("order")
    return [f"{name}={','.join(map(written, values))}" for name, values in axes.items() if name not in named]


def quoted(value: str) -> str:
    """As a value of an override in which nothing is special."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def written(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{written(str(key))}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf") else quoted(value)
    return json.dumps(value)
