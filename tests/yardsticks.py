"""What speed is measured against, since no second is the same on two machines: work that everyone knows, done on the machine of the test.

A bound is a multiple of one of these, measured in the same test, never a number of seconds. CPU time where the work is ours alone, since
other processes stretch wall time; wall time where several processes take part. bench/ prints the figures that bounds leave room above.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = "import hydra, omegaconf, pydantic"  # what every command of llmpress has to import


def work_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of `work` in this process, the least of several times: after the first, nothing is imported."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def command_seconds(command: list[str], folder: Path | None = None, env: Mapping[str, str] = os.environ, repeats: int = 2) -> float:
    """CPU seconds of a command that succeeds, with those of the processes that it waited for; the least of several times.

    The first time, what it imports is compiled, and what it remembers is found out.
    """
    times, env = [], {**env, "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def import_seconds() -> float:
    """CPU seconds of an interpreter that imports LIBRARIES: from 0.2 to 0.5 on machines of today."""
    return command_seconds([sys.executable, "-c", LIBRARIES], repeats=3)
