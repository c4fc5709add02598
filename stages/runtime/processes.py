"""The processes that train one model together, each on a device of its own. Where nothing was launched, this one alone.

Names are accelerate's. A function that says "every process calls it" returns when all of them have.
"""

import os
from collections.abc import Mapping

import torch
from torch import distributed
from torch.distributed.tensor import DTensor


def process_index() -> int:
    """0 is the process that writes and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_sharded() -> bool:
    """Whether they split the weights among them (FSDP) instead of having a copy each: accelerate's launcher tells by this variable."""
    return num_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def wait_for_everyone() -> None:
    """Every process calls it."""
    if num_processes() > 1:
        distributed.barrier()


def as_main_says(value: bool) -> bool:
    """Process 0's value in all of them, for what clocks decide. Every process calls it."""
    said = [value]
    if num_processes() > 1:
        distributed.broadcast_object_list(said)
    return said[0]


def average(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's mean over the processes, which have the same names. Every process calls it."""
    said = [dict(values)] * num_processes()
    if num_processes() > 1:
        distributed.all_gather_object(said, dict(values))
    return {name: sum(one[name] for one in said) / len(said) for name in values}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, and any other as it is. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
