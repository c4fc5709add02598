"""A process of a launched stage that shards over CPUs: torch can, but accelerate asks for accelerators before it uses FSDP."""

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from stages.runtime.launch import take_part


def claim_accelerators() -> None:
    make = PartialState.__init__

    def claim(state: PartialState, *args: Any, **options: Any) -> None:
        make(state, *args, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = claim


if __name__ == "__main__":
    claim_accelerators()
    take_part(Path(sys.argv[1]))
