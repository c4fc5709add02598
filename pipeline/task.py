"""What Hydra calls with the composed config of every job of a sweep.

A launcher may call it in another process or on another machine, where it is found by import. So nothing is handed to it but the config.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose
from pipeline.errors import Interrupted, LlmpressError, sentences
from pipeline.modes import carry_out
from pipeline.objectives import Returned
from pipeline.parent import end_with_parent
from pipeline.sweep.record import RunningJob

LAUNCHER = "LLMPRESS_LAUNCHER"  # the process that began the sweep, for its jobs in others


def run_job(config: DictConfig) -> Returned:
    """One job of a sweep: carried out, with its record kept in the sweep's folder, and its error printed: Hydra goes on with others."""
    hydra, elsewhere = HydraConfig.get(), _in_another_process()
    if elsewhere and os.getcwd() != hydra.runtime.cwd:
        os.chdir(hydra.runtime.cwd)  # so that relative paths mean what they meant where they were written
    overrides, job = tuple(hydra.overrides.task), None
    try:
        try:
            if config.get("mode") == "run":
                job = RunningJob(Path(hydra.sweep.dir).absolute(), overrides, f"[{hydra.job.num}]" if elsewhere else "")
            returned = carry_out(compose.read(config), job)
        except OmegaConfBaseException as error:
            raise compose.explain(error) from None
        except KeyboardInterrupt:
            raise Interrupted("interrupted; what is finished is kept, and the same command continues from there") from None
    except LlmpressError as error:
        if job:
            job.ended(error.exit_code, str(error))
        if isinstance(error, Interrupted):
            raise KeyboardInterrupt from None  # Hydra would go on with the next job
        print(f"job {hydra.job.num}, {' '.join(overrides)}\n{sentences(error)}", file=sys.stderr)
        error.told = True
        raise
    except Exception as error:  # a mistake of this program: told in full, and no reason to lose the other jobs
        traceback.print_exc()
        mistake = LlmpressError(f"{type(error).__name__}: {error}")
        mistake.told = True
        if job:
            job.ended(mistake.exit_code, str(mistake))
        raise mistake from error
    if job:
        job.ended(0)
    return returned


def _in_another_process() -> bool:
    """Whether a launcher put this job into a process other than its own, which then ends with the launcher's where that is its parent."""
    launcher = os.environ.get(LAUNCHER)
    if launcher == process_name(os.getppid()):
        end_with_parent(os.getppid())
    return launcher != process_name(os.getpid())


def process_name(pid: int) -> str:
    """A process of this machine, among those of all that share the sweep."""
    return f"{socket.gethostname()}:{pid}"
