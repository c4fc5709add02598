"""What a worker can say of itself: memory, in bytes, and where it ran. Imports and initialises none of the libraries it asks about."""

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("llmpress", "torch", "transformers", "safetensors", "tokenizers", "compressed-tensors", "llmcompressor", "numpy", "pydantic")


def peak_rss() -> int:
    """Bytes. From /proc on Linux: after an exec, getrusage still counts the peak of the process that was replaced."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return parse_peak_rss(status)


def parse_peak_rss(status: str) -> int:
    """Bytes, from the content of a /proc/<pid>/status; 0 for a zombie, whose memory is gone."""
    return _parse_bytes(status, "VmHWM")


def resident() -> int | None:
    """Bytes of this process in memory now; None on a system without /proc, where only the peak is known."""
    try:
        return _parse_bytes(Path("/proc/self/status").read_text(), "VmRSS")
    except OSError:
        return None


def _parse_bytes(status: str, field: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def peak_vram() -> int | None:
    """Bytes that torch's allocator held at most, over all GPUs, free blocks that it kept included; None where CUDA was not used."""
    cuda = _cuda()
    return sum(cuda.max_memory_reserved(device) for device in range(cuda.device_count())) if cuda else None


def _cuda() -> Any:
    """torch.cuda where this process has initialised CUDA, else None. Asking neither imports nor initialises anything."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def environment() -> dict[str, str]:
    """Where a result was computed: provenance, never part of a key. Imports none of the libraries it names."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpus": str(os.cpu_count()),
    }
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an isolated backend has its own set
    cuda = _cuda()
    if cuda:
        found["gpu"] = cuda.get_device_name()
    return found


def out_of_memory_kills() -> int:
    """How many processes of this control group (v2 or v1) the kernel has killed for lack of memory; 0 where it does not say."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return 0
    count = 0
    for _, controllers, path in groups:
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.events"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.oom_control"
        else:
            continue
        for folder in (root / path.lstrip("/"), root):  # in a container, the path may be the host's and the root one's own
            try:
                fields = dict(line.split() for line in (folder / name).read_text().splitlines())
            except OSError:
                continue
            count = max(count, int(fields.get("oom_kill", 0)))
            break
    return count
