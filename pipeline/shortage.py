"""Can a stage run on the machine that is to run it, and if not, which change makes it possible?

Every answer is computed: the stage's own `lighter` changes are tried, one at a time and then together, and its memory is asked again.
Example: full distillation of a 57 B student on one 80 GB card:

    found = shortage("distill", stage, specs, machine, others=lambda: {"h200_141gb": ...})
    print(found.sentence)     # stages.distill: needs 1.03 TB of VRAM ...; nearest change that fits: stages.distill.method=lora
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.layout import Frozen
from pipeline.stage import Lighter, Stage
from pipeline.target import Memory, Target, format_size

CUDA_BYTES = 1 << 30  # of a GPU: CUDA's context, the libraries' kernels and workspaces, fragments between tensors
LIBRARY_BYTES = 1 << 30  # of RAM: the interpreter with torch and transformers; 0.6 to 0.9 GB measured
MOST_TOGETHER = 4  # changes that are tried together

Place = Literal["vram", "ram"]


class Shortage(Frozen):
    """What a node has too little of, in bytes, and what would be enough, nearest first."""

    node: str
    place: Place
    needed: int
    room: int
    sentence: str
    remedies: tuple[str, ...] = ()


def shortage(
    name: str, stage: Stage, specs: Mapping[str, Any], machine: Target, others: Callable[[], Mapping[str, Target]]
) -> Shortage | None:
    """The first place in which the stage does not fit `machine`; `others` gives the machines to look for a larger one among."""
    lack = _lacking(stage, specs, machine)
    if lack is None:
        return None
    place, needed, room = lack
    remedies = [f"stages.{name}.{text}" for text in _lightest(stage, specs, machine)]
    remedies = [" and ".join(remedies)] if remedies else []
    larger = [(other.price or math.inf, label) for label, other in others().items() if other.cuda and _lacking(stage, specs, other) is None]
    if larger:
        price, label = min(larger)
        remedies.append(f"a larger machine, {label}" + ("" if price == math.inf else f" (${price:.2f} per hour)"))
    overhead = "CUDA and fragments" if place == "vram" else "interpreter and libraries"
    need = f"{format_size(needed)} of {place.upper()}, {overhead} included"
    problem = f"stages.{name}: needs {need}, and {machine.name} has {format_size(room)}"
    told = f"; what would fit: {', or '.join(remedies)}" if remedies else "; no change that is known makes it fit"
    return Shortage(node=name, place=place, needed=needed, room=room, sentence=problem + told, remedies=tuple(remedies))


def _lacking(stage: Stage, specs: Mapping[str, Any], machine: Target) -> tuple[Place, int, int] | None:
    return lacking(stage.memory(target=machine, **specs), machine)


def lacking(memory: Memory, machine: Target) -> tuple[Place, int, int] | None:
    """The place that is too small, the bytes needed there and those it has. A memory of unknown size is taken as enough."""
    totals = memory.totals
    places: tuple[tuple[Place, int, int | None], ...] = (("vram", CUDA_BYTES, machine.memory), ("ram", LIBRARY_BYTES, machine.ram))
    for place, overhead, room in places:
        needed = totals[place] + overhead
        if totals[place] and room is not None and needed > room:
            return place, needed, room
    return None


def _lightest(stage: Stage, specs: Mapping[str, Any], machine: Target) -> list[str]:
    """The fewest changes that make it fit, of these the nearest: all but the last as light as they can be."""
    kinds = list(dict.fromkeys(text.partition("=")[0] for text, _, _ in _options(stage, specs)))
    for count in range(1, min(MOST_TOGETHER, len(kinds)) + 1):
        for chosen in combinations(kinds, count):
            texts: list[str] = []
            changed, given = stage, dict(specs)
            for kind in chosen:
                options = [option for option in _options(changed, given) if option[0].partition("=")[0] == kind]
                if not options:
                    break
                fitting = (option for option in options if _lacking(option[1], option[2], machine) is None)
                text, changed, given = next(fitting, options[-1])
                texts.append(text)
            if len(texts) == count and _lacking(changed, given, machine) is None:
                return texts
    return []


def _options(stage: Stage, specs: Mapping[str, Any]) -> Iterator[Lighter]:
    """The stage's lighter changes that are legal for these inputs."""
    for option in stage.lighter(**specs):
        try:
            option[1].infer(**option[2])
        except (ValueError, ValidationError):
            continue
        yield option
