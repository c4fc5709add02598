"""A command that Hydra has to be asked about: it composes the config, prints help, completes a word, launches a sweep.

Its messages are put into this project's one sentence, and what it answers is remembered where that is possible (pipeline/learned.py), so
that the same command again does without it.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline import completion, completion_source, compose
from pipeline.errors import LlmpressError
from pipeline.learned import Composed, Learned, asks_for_help, keep_config, learned_config, learned_help
from pipeline.objectives import Returned
from pipeline.resources import resources
from pipeline.stage import plugin_paths

OWN_SOURCES = {"hydra", "main", "schema"}  # of configs; others may come with packages of Hydra's


def command(arguments: list[str]) -> int:
    """The exit code. LlmpressError of any kind where it does not end well."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed with a search path
    try:
        compose.register()
        learned = learned_help(arguments) if asks_for_help(arguments) else learned_config(arguments)  # its mark is older than what is read
        taken = compose.take_recipe_files(arguments)
        if compose.is_sweep(taken):
            from pipeline.sweep import command  # here: with its reports it is half of what is imported, for sweeps alone

            return command.run_sweep(arguments, taken)
        sys.argv[1:] = taken
        if completion.is_query(taken):
            _complete(taken)
        elif asks_for_help(taken):
            _help(arguments, learned)
        elif any(argument.startswith("-") or "hydra" in argument for argument in taken):
            _main()
        else:
            _compose(taken, learned)
    except (HydraException, OmegaConfBaseException) as error:
        raise compose.explain(error) from None
    return 0


def _compose(taken: list[str], learned: Learned) -> None:
    config = compose.read(compose.composed(taken))
    if {source.provider for source in HydraConfig.get().runtime.config_sources} <= OWN_SOURCES:
        keep_config(learned, config)
    _carry_out(config)


def _complete(arguments: Sequence[str]) -> None:
    """Learn what this line chooses, so that the next TAB in it is quick; what cannot be learned is answered by Hydra itself."""
    line, known = completion.read_line(os.environ["COMP_LINE"]), None
    with contextlib.suppress(HydraException):  # the line cannot be read: Hydra says so below
        known = completion_source.learn(line) if line else None
    candidates = completion.answer(arguments, known)
    if candidates is None:
        _main()
    else:
        print(candidates)


def _carry_out(config: Composed) -> Returned:
    from pipeline.modes import carry_out  # here: help and completion do without what makes and prints plans

    return carry_out(config)


def _help(arguments: Sequence[str], learned: Learned) -> None:
    """Stages of other packages are told, but their settings are not remembered."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            _main()
    except SystemExit as ended:
        if not ended.code and not (plugin_paths() and len(arguments) > 1):
            learned.keep(printed.getvalue())
        raise
    finally:
        print(printed.getvalue(), end="")


def _main() -> None:
    """Hydra's own flags and settings: `--help`, `--cfg job`, `hydra.verbose=true`."""
    failed: list[LlmpressError] = []

    def task(config: DictConfig) -> Returned:
        try:
            return _carry_out(compose.read(config))
        except OmegaConfBaseException as error:
            failed.append(compose.explain(error))
        except LlmpressError as error:  # raised here, Hydra would print its own lines about it first
            failed.append(error)
        return {}

    hydra.main(config_path=str(resources() / "conf"), config_name="config", version_base="1.3")(task)()
    if failed:
        raise failed[0]
