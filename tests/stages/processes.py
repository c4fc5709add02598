"""A child process that dies in the middle of its work."""

import os
import signal
from collections.abc import Callable

import torch


def killed(work: Callable[[], object]) -> None:
    """Run `work` in a forked child, which must end by SIGKILL: `work` arranges that."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads are not there after a fork, and would be waited for
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
