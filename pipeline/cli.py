"""`run`: compose a recipe with Hydra, plan it, run it, and say what happened. Nothing heavy is imported here.

Hydra composes (`group=name`, `key=value`, `-m` for sweeps, completion); its messages are put into this project's one sentence. What it
calls with the composed config is in pipeline/task.py. Exit codes are those of `pipeline.errors`.
"""

import os
import signal
import sys
from types import FrameType

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline import compose
from pipeline.errors import Interrupted, LlmpressError, sentences
from pipeline.objectives import Returned
from pipeline.task import fork_server, run_alone


def main() -> None:
    """Entry point of `run`, `llmpress` and `python -m pipeline`."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(_main(sys.argv[1:]))
    except LlmpressError as error:
        if not error.told:
            print(sentences(error), file=sys.stderr)
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
    try:
        compose.register()
        taken = compose.take_recipe_files(arguments)
        if compose.is_sweep(taken):
            from pipeline.sweep import command  # here: with its reports it is half of what is imported, for sweeps alone

            return command.run_sweep(arguments, taken)
        sys.argv[1:] = taken
        if any(argument.startswith("-") or "hydra" in argument for argument in taken):
            _with_hydra()
        else:
            run_alone(compose.composed(taken))
    except (HydraException, OmegaConfBaseException) as error:
        raise compose.explain(error) from None
    finally:
        fork_server().close()
    return 0


def _with_hydra() -> None:
    """Hydra's own flags and settings: `--help`, `--cfg job`, `hydra.verbose=true`."""
    import hydra

    failed: list[LlmpressError] = []

    def task(config: DictConfig) -> Returned:
        try:
            return run_alone(config)
        except OmegaConfBaseException as error:
            failed.append(compose.explain(error))
        except LlmpressError as error:  # raised here, Hydra would print its own lines about it first
            failed.append(error)
        return {}

    hydra.main(config_path=str(compose.resources() / "conf"), config_name="config", version_base="1.3")(task)()
    if failed:
        raise failed[0]


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
