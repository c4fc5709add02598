"""The line under which a bench's figures stand: which processor, what it has units for, and what the environment hides of it."""

import os

from pipeline.compute_dtype import has_bf16_units
from pipeline.machine import fingerprint

HIDES = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def processor() -> str:
    units = "bf16 units" if has_bf16_units() else "no bf16 units"
    hidden = [f"{name}={os.environ[name]}" for name in HIDES if os.environ.get(name)]
    return ", ".join([fingerprint(), units, *hidden, f"load average {os.getloadavg()[0]:.1f}"])
