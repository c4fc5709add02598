"""Which machine this is, for results that hold only there: a speed. Asks the operating system, and no library.

    fingerprint()    # 'AMD EPYC, 2 cores, 24 GiB RAM' or 'Intel(R) Xeon(R) Platinum 8480+, 16 cores, 126 GiB RAM, 2 x NVIDIA H200'

Whatever a computation gets of the machine counts: the cores that it may use, the share of their time that a container has, and what the
environment leaves to it (`OMP_NUM_THREADS`, `CUDA_VISIBLE_DEVICES`). No host name: another machine of the same kind is as fast. Of
GPUs, NVIDIA's are named; without /proc, as on macOS, a processor is known by its architecture alone.
"""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

THREADS, VISIBLE = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
GIB = 1 << 30


@cache
def fingerprint() -> str:
    """Of this machine, for this process and those that it starts."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return describe(Path("/"), os.environ.get(THREADS, ""), os.environ.get(VISIBLE), core_count(), ram)


@cache
def flags_digest(root: Path = Path("/")) -> str:
    """Of the instructions that the processor has: a hypervisor may hide some of a model's."""
    fields = _fields(root / "proc/cpuinfo")
    return hashlib.sha256((fields.get("flags") or fields.get("Features", "")).encode()).hexdigest()


def core_count() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(root: Path, threads: str, visible: str | None, cores: int, ram: int) -> str:
    """One line about the machine whose /proc and /sys are below `root`; `ram` in bytes, `threads` and `visible` as in the environment."""
    parts = [_cpu(root), f"{cores} {'core' if cores == 1 else 'cores'}", *_quota(root)]
    parts += [f"{THREADS}={threads}"] if threads else []
    return ", ".join([*parts, f"{round(ram / GIB)} GiB RAM", *_gpus(root, visible)])


def _fields(file: Path) -> dict[str, str]:
    """The first record of `name : value` lines; empty where there is no such file."""
    found: dict[str, str] = {}
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return found


def _cpu(root: Path) -> str:
    """Its model; on ARM, where the kernel knows no names, the numbers of maker and part."""
    fields = _fields(root / "proc/cpuinfo")
    named = fields.get("model name") or " ".join(fields[name] for name in ("CPU implementer", "CPU part") if name in fields)
    return " ".join(named.split()) if "model name" in fields else f"{platform.machine()} {named}".strip()


def _quota(root: Path) -> Iterator[str]:
    """The share of the cores' time that a container is given (control groups v2), where it is limited."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return
    if quota != "max":
        yield f"limited to {int(quota) / int(period):g}"


def _gpus(root: Path, visible: str | None) -> list[str]:
    """`2 x NVIDIA H200`, of those that CUDA may see. Where some are hidden of an unlike set, which are left is not told: the setting is."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    models = [_fields(file).get("Model", "unknown GPU") for file in files]
    hidden = []
    if visible is not None and models:
        chosen = [entry for entry in visible.split(",") if entry.strip()]
        if len(set(models)) == 1 and all(entry.strip().isdigit() for entry in chosen):
            models = models[: len(chosen)]
        else:
            hidden = [f"{VISIBLE}={visible}"]
    return [f"{count} x {model}" if count > 1 else model for model, count in sorted(Counter(models).items())] + hidden
