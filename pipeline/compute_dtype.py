"""In which dtype numbers are computed: bf16 where the machine has units for it, else fp32. Decided here alone, without torch.

A bf16 matrix product on a CPU without such units takes 4 to 8 times as long as the same in fp32. Results differ in their last digits, so
that what `auto` became is part of a stage's key, and never mixed within a comparison. What is stored keeps its own dtype.

    fastest_dtype(Target(name="a100", gpus=1, compute_capability=8.0))    # bf16: a GPU has units from compute capability 8.0 on
    fastest_dtype(Target.host())                                          # as this processor says

The jobs of a sweep may run on unlike machines: what the machine that begins it decides reaches them as `LLMPRESS_COMPUTE_DTYPE`.
"""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from pipeline.errors import RecipeError
from pipeline.headers import ITEM_BYTES
from pipeline.layout import DType, Frozen
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.target import Target

Dtype = Literal["bf16", "fp32"]
STORED: dict[Dtype, DType] = {"bf16": "BF16", "fp32": "F32"}  # as safetensors names them
DECIDED = "LLMPRESS_COMPUTE_DTYPE"  # what processors are taken to compute fastest, where it is set
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # in /proc/cpuinfo: of x86-64, and of Arm (FEAT_BF16)
BF16_CAPABILITY = 8.0  # NVIDIA's GPUs from Ampere on


class Computing(Frozen):
    """Parameters of a stage that multiplies with a model's weights."""

    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: what the machine that computes does fastest

    @model_validator(mode="before")
    @classmethod
    def _was_called_dtype(cls, given: Any) -> Any:
        if isinstance(given, dict) and "dtype" in given and "dtype" not in cls.model_fields:
            raise ValueError(f"dtype: it is called compute_dtype; write compute_dtype: {given['dtype']}")
        return given

    @property
    def computes_in(self) -> Dtype:
        """Of parameters that no plan has settled: what this machine's processor computes fastest."""
        return processor_dtype() if self.compute_dtype == "auto" else self.compute_dtype

    @property
    def item(self) -> int:
        """Bytes of a value in the computation."""
        return ITEM_BYTES[STORED[self.computes_in]]

    def in_memory(self, model: ModelSpec) -> ModelSpec:
        """The model as it computes: its weights, its scales and what flows through it in the dtype of the computation."""
        return model.in_dtype(STORED[self.computes_in])

    def products(self, flops: float) -> Work:
        """So many FLOP, at the rate of the dtype."""
        return Work(flops=flops) if self.computes_in == "bf16" else Work(float32_flops=flops)


def fastest_dtype(machine: Target) -> Dtype:
    """Of the machine's GPUs where stages compute on these, else of the processor that plans, taken to be the one that executes."""
    if machine.cuda:
        return "bf16" if machine.compute_capability is None or machine.compute_capability >= BF16_CAPABILITY else "fp32"
    return processor_dtype()


def slow_sentences(dtype: Dtype | None, machine: Target, on_gpu: bool) -> list[str]:
    """What it costs to compute in bf16 where nothing has units for it, for the plan."""
    if dtype != "bf16" or fastest_dtype(machine if on_gpu else machine.without_gpus()) == "bf16":
        return []
    times, where = "4 to 8", "this GPU" if on_gpu else "this processor"
    if machine.flops and machine.float32_flops:
        times = f"{machine.float32_flops / machine.flops:.1f}"
    return [f"compute_dtype bf16: {where} has no units for it, and takes {times} times as long as in fp32"]


def processor_dtype() -> Dtype:
    """RecipeError where the environment says something that is no dtype."""
    decided = os.environ.get(DECIDED, "")
    if decided not in ("", *STORED):
        raise RecipeError([f"{DECIDED}: '{decided}' is no dtype; write bf16 or fp32, or leave it unset"])
    return decided or ("bf16" if has_bf16_units() else "fp32")  # type: ignore[return-value]  # one of STORED


@cache
def has_bf16_units(root: Path = Path("/")) -> bool:
    """Whether this machine's processor multiplies bf16 by instructions of its own; `root` holds its /proc."""
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "hw.optional.arm.FEAT_BF16"], capture_output=True, text=True, check=False)
        return asked.stdout.strip() == "1"
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a system without /proc: fp32 is right everywhere, and slower where it has units
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not BF16_FLAGS.isdisjoint(flags)
