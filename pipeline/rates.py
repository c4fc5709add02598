"""What this machine's processor computes a second: measured once, by a process that has torch, and remembered. Imports no torch itself.

    at_measured_rates(Target.host()).float32_flops    # 1.6e11: the first time after a few seconds, later from a file

A plan for `host` then has hours. Measured are matrix products in both dtypes, a copy within memory, and a loop of plain Python, which
tells how fast a core is at everything else. It is remembered (pipeline/remembered.py) for each processor, number of cores,
version of Python and torch, and setting of its libraries. What was measured while others used the machine is taken for an hour only. No
key holds a rate.

`LLMPRESS_RATES` says instead what is to be taken, as that file has it: for a plan that is to be the same on every machine.
"""

import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from typing import Any

from pydantic import Field, ValidationError

from pipeline import machine
from pipeline.errors import RecipeError
from pipeline.identity import library_version
from pipeline.installed import package_path
from pipeline.layout import Frozen
from pipeline.library_defaults import LIBRARY_DEFAULTS
from pipeline.remembered import Remembered
from pipeline.target import Target

GIVEN = "LLMPRESS_RATES"
SETTINGS = (  # of the libraries that multiply: which instructions they use, and how many threads
    "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_NUM_THREADS",
)  # fmt: skip
LOOP = 4.5e-3  # seconds of the loop on the core that stages' figures are of: a virtual one of a Xeon with AMX
BUSY_LASTS = 3600  # seconds
TIMEOUT = 120  # seconds: importing torch from a slow disk takes most of them


class Rates(Frozen):
    """FLOP/s of products in bf16 and float32 and bytes/s of a copy, by all threads together; seconds of a loop of plain Python."""

    flops: float = Field(ge=1e7, le=1e17)
    float32_flops: float = Field(ge=1e7, le=1e17)
    bandwidth: float = Field(ge=1e7, le=1e15)
    loop: float = Field(ge=1e-5, le=10)
    threads: int = Field(ge=1, le=4096)  # that a library uses here: of the cores those that it may, and that are not the half of another
    quiet: bool = True  # whether nothing else kept the cores from it

    @property
    def core_speed(self) -> float:
        return LOOP / self.loop


RATES = ("flops", "float32_flops", "bandwidth", "core_speed")  # of a target, by the same names


def at_measured_rates(target: Target) -> Target:
    """The same with this machine's rates where it is `host` without a GPU; what it states itself stays. Unchanged where none can be had."""
    absent = [name for name in RATES if getattr(target, name) is None]
    if target.name != "host" or target.gpus or not absent:
        return target
    found = _given(os.environ[GIVEN]) if os.environ.get(GIVEN) else _measured(*_identity())
    if found is None:
        return target
    measured = {name: getattr(found, name) for name in absent}
    return target.model_copy(update=measured | {"cores": min(target.cores or found.threads, found.threads)})


def _given(text: str) -> Rates:
    try:
        return Rates.model_validate_json(text)
    except ValidationError as error:
        fields = ", ".join(name for name, field in Rates.model_fields.items() if field.is_required())
        first = error.errors()[0]
        where = "".join(f" {field}:" for field in first["loc"])
        raise RecipeError([f"{GIVEN}:{where} {first['msg']}; write a JSON object with {fields}, or leave it unset"]) from None


def _identity() -> tuple[str, ...]:
    """Of whatever decides how fast this process' children compute."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return (
        machine.fingerprint(),
        machine.flags_digest(),
        f"Python {platform.python_version()}",
        f"torch {library_version('torch')}",
        *settings,
    )


@cache
def _measured(*identity: str) -> Rates | None:
    """Remembered, or measured now and remembered. None where there is no torch or it cannot be run, which is said."""
    if library_version("torch") is None:
        return None
    memory, key = Remembered("rates"), json.dumps(identity)
    found = _still_true(memory.recall(key, mark=None))
    if found is None:
        print("measuring how fast this machine computes, which takes some seconds and is remembered", file=sys.stderr)
        found = _measure()
        if found is not None:
            memory.keep(key, None, {"rates": found.model_dump(), "time": time.time()})
    return found


def _still_true(remembered: Any) -> Rates | None:
    """None where nothing is remembered, or what makes no sense, or what was measured on a busy machine a while ago."""
    try:
        found = Rates.model_validate(remembered["rates"])
        fresh = 0 <= time.time() - remembered["time"] < BUSY_LASTS
    except (ValueError, KeyError, TypeError):
        return None
    return found if found.quiet or fresh else None


def _measure() -> Rates | None:
    command = [sys.executable, "-P", "-m", "stages.runtime.measure_rates"]
    environment = {**LIBRARY_DEFAULTS, **os.environ, **package_path()}
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        return Rates.model_validate_json(ended.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValidationError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        print(f"warning: how fast this machine computes could not be measured, so that its plan has no hours: {said[0]}", file=sys.stderr)
        return None
