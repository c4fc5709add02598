"""`run`: compose a recipe with Hydra, plan it, run it, and say what happened. Nothing heavy is imported here.

Hydra composes (`group=name`, `key=value`, `-m` for sweeps, completion); its messages are put into this project's one sentence.
Exit codes are those of `pipeline.errors`.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose
from pipeline.errors import Interrupted, LlmpressError, RecipeError
from pipeline.objectives import Returned, objectives
from pipeline.process import ForkServer
from pipeline.recipe import read_config, read_settings
from pipeline.run import collect_unused, run_pipeline


def main() -> None:
    """Entry point of `run`, `llmpress` and `python -m pipeline`."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(_main(sys.argv[1:]))
    except LlmpressError as error:
        print(_sentences(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `run --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


def _main(arguments: list[str]) -> int:
    if not arguments:
        print(compose.recipe_list())
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed with a search path
    failed: list[LlmpressError] = []
    server = ForkServer(Path("forkserver.log"))  # starts at the first stage that runs; every job of a sweep uses it

    def task(config: DictConfig) -> Returned:
        alone = HydraConfig.get().mode is not RunMode.MULTIRUN
        try:
            return _job(config, server)
        except OmegaConfBaseException as error:
            problem: LlmpressError = compose.explain(error)
        except Interrupted as error:
            if not alone:
                raise KeyboardInterrupt from None  # Hydra would go on with the next job
            problem = error
        except LlmpressError as error:
            problem = error
        if not alone:
            print(f"job {' '.join(HydraConfig.get().overrides.task)}\n{_sentences(problem)}", file=sys.stderr)
            raise problem  # so that Hydra counts the job as failed
        failed.append(problem)  # raised here, Hydra would print its own lines about it first
        return {}

    try:
        compose.register()
        sys.argv[1:] = compose.take_recipe_files(arguments)
        folder = str(compose.resources() / "conf")
        if any(argument.startswith("-") or "hydra" in argument for argument in sys.argv[1:]):
            hydra.main(config_path=folder, config_name="config", version_base="1.3")(task)()
        else:
            task(_composed(folder, sys.argv[1:]))
    except (HydraException, OmegaConfBaseException) as error:
        raise compose.explain(error) from None
    finally:
        server.close()
    if failed:
        raise failed[0]
    return 0


def _composed(folder: str, overrides: list[str]) -> DictConfig:
    """The config of a run without Hydra's own flags and settings. `hydra.main` would compose it twice, first to look for a sweep."""
    with hydra.initialize_config_dir(folder, job_name="run", version_base="1.3"):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def _job(config: DictConfig, server: ForkServer) -> Returned:
    """One composed config, alone or as a job of a sweep; returns the final metrics or, of a run, the chosen `objectives`."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    content = {str(key): value for key, value in plain.items()}
    name = HydraConfig.get().runtime.choices.get("recipe")
    if content.get("mode") == "gc":
        return collect_unused(read_settings(content))
    if name is None:
        raise RecipeError(f"no recipe is chosen; write recipe=<name>\n\n{compose.recipe_list()}")
    recipe, settings = read_config(content, compose.display_name(name))
    sweep = str(Path(HydraConfig.get().sweep.dir).resolve()) if HydraConfig.get().mode is RunMode.MULTIRUN else ""
    metrics = run_pipeline(recipe, settings, OmegaConf.to_yaml(config, resolve=True), compose.resources(), server, sweep)
    return objectives(metrics, settings.objectives if settings.mode == "run" else None)


def _sentences(error: LlmpressError) -> str:
    problems: list[Any] = error.problems if isinstance(error, RecipeError) else [error]
    return "\n".join(f"error: {problem}" for problem in problems)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
