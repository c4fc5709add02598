"""The card as torch describes it: `python -m tests.gpu.card` prints one JSON object.

A process of its own asks, so that the one that plans and starts workers holds no CUDA context and takes no memory of the card.
"""

import json
import subprocess
import sys
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """`memory` in bytes; without a card that torch can use, neither `name` nor what follows it."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "count": torch.cuda.device_count()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"name": card.name, "memory": card.total_memory, "compute_capability": float(f"{card.major}.{card.minor}")}
    return found


def ask() -> dict[str, Any]:
    """`describe()` of another process, in this one's environment."""
    done = subprocess.run([sys.executable, "-P", "-m", __name__], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(describe()))
