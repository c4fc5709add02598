"""One composed config, and what its `mode` asks for: run it, plan it, check a checkpoint, collect what no run uses.

What one mode alone needs is imported there, for a plan does without most of it. The server that starts the stages of all jobs of this
process is made at the first of them.
"""

import atexit
from functools import cache
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.learned import Composed
from pipeline.objectives import Returned, objectives
from pipeline.planning import show_plan
from pipeline.process import ForkServer
from pipeline.recipe import Settings, read_config, read_settings
from pipeline.resources import recipe_list, resources
from pipeline.sweep.record import RunningJob


@cache
def fork_server() -> ForkServer:
    """Of this process; it starts at the first stage that runs."""
    server = ForkServer(Path("forkserver.log"))
    atexit.register(server.close)
    return server


def carry_out(config: Composed, job: RunningJob | None = None) -> Returned:
    """The final metrics or, of a run, the chosen `objectives`. LlmpressError of any kind where it does not end well."""
    if config.content.get("mode") == "gc":
        from pipeline.run import collect_unused

        return collect_unused(read_settings(config.content))
    if config.content.get("mode") == "check":
        return _check(config, read_settings(config.content))
    if config.recipe is None:
        raise RecipeError(f"no recipe is chosen; write recipe=<name>\n\n{recipe_list()}")
    recipe, settings = read_config(config.content, config.recipe)
    if settings.lock == "auto" and config.on_other_machines:
        settings = settings.model_copy(update={"lock": "lease"})
    if settings.mode == "plan":
        show_plan(recipe, settings, resources())
        return {}
    from pipeline.run import run_pipeline

    return objectives(run_pipeline(recipe, settings, config.text, resources(), fork_server(), job), settings.objectives)


def _check(config: Composed, settings: Settings) -> Returned:
    if config.recipe is not None:
        raise RecipeError("recipe: mode=check looks at a checkpoint and reads no recipe; leave it out and write path=/folder")
    from pipeline.check import check_checkpoint

    return check_checkpoint(settings, resources())
