"""What Hydra calls with every composed config: one run, or one job of a sweep.

A launcher may call it in another process or on another machine, where it is found by import. So nothing is handed to it but the
config, and what all jobs of one process share, the server that starts their stages, is made at the first of them.
"""

import atexit
import os
import socket
import sys
import traceback
from functools import cache
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose
from pipeline.errors import Interrupted, LlmpressError, RecipeError, sentences
from pipeline.objectives import Returned, objectives
from pipeline.parent import end_with_parent
from pipeline.planning import show_plan
from pipeline.process import ForkServer
from pipeline.recipe import Settings, read_config, read_settings
from pipeline.sweep.record import RunningJob

ON_OTHER_MACHINES = ("SlurmLauncher", "RayLauncher", "RayAWSLauncher")  # whose jobs share the outputs folder between machines
LAUNCHER = "LLMPRESS_LAUNCHER"  # the process that began the sweep, for its jobs in others


@cache
def fork_server() -> ForkServer:
    """Of this process; it starts at the first stage that runs."""
    server = ForkServer(Path("forkserver.log"))
    atexit.register(server.close)
    return server


def run_alone(config: DictConfig) -> Returned:
    """The run of one config. LlmpressError of any kind where it does not end well."""
    return _run(config)


def run_job(config: DictConfig) -> Returned:
    """One job of a sweep: as `run_alone`, with its record kept in the sweep's folder, and its error printed: Hydra goes on with others."""
    hydra, elsewhere = HydraConfig.get(), _in_another_process()
    if elsewhere and os.getcwd() != hydra.runtime.cwd:
        os.chdir(hydra.runtime.cwd)  # so that relative paths mean what they meant where they were written
    overrides, job = tuple(hydra.overrides.task), None
    try:
        try:
            if config.get("mode") == "run":
                job = RunningJob(Path(hydra.sweep.dir).absolute(), overrides, f"[{hydra.job.num}]" if elsewhere else "")
            returned = _run(config, job)
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


def _run(config: DictConfig, job: RunningJob | None = None) -> Returned:
    """The final metrics or, of a run, the chosen `objectives`. What one mode alone needs is imported there, for a plan does without it."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    content = {str(key): value for key, value in plain.items()}
    if content.get("mode") == "gc":
        from pipeline.run import collect_unused

        return collect_unused(read_settings(content))
    if content.get("mode") == "check":
        return _check(read_settings(content))
    name = HydraConfig.get().runtime.choices.get("recipe")
    if name is None:
        raise RecipeError(f"no recipe is chosen; write recipe=<name>\n\n{compose.recipe_list()}")
    recipe, settings = read_config(content, compose.display_name(name))
    if settings.lock == "auto" and HydraConfig.get().launcher._target_.endswith(ON_OTHER_MACHINES):
        settings = settings.model_copy(update={"lock": "lease"})
    if settings.mode == "plan":
        show_plan(recipe, settings, compose.resources())
        return {}
    from pipeline.run import run_pipeline

    composed = OmegaConf.to_yaml(config, resolve=True)
    return objectives(run_pipeline(recipe, settings, composed, compose.resources(), fork_server(), job), settings.objectives)


def _check(settings: Settings) -> Returned:
    if HydraConfig.get().runtime.choices.get("recipe") is not None:
        raise RecipeError("recipe: mode=check looks at a checkpoint and reads no recipe; leave it out and write path=/folder")
    from pipeline.check import check_checkpoint

    return check_checkpoint(settings, compose.resources())


def _in_another_process() -> bool:
    """Whether a launcher put this job into a process other than its own, which then ends with the launcher's where that is its parent."""
    launcher = os.environ.get(LAUNCHER)
    if launcher == process_name(os.getppid()):
        end_with_parent(os.getppid())
    return launcher != process_name(os.getpid())


def process_name(pid: int) -> str:
    """A process of this machine, among those of all that share the sweep."""
    return f"{socket.gethostname()}:{pid}"
