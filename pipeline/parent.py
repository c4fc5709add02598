"""Processes that do not outlive the one that started them, even where that is killed. Needs nothing but the system's C library."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """Linux: the kernel kills this process as soon as `parent` dies, even while native code holds the GIL."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
