"""The final model under the load that a recipe states: does it fit the target, how fast is it there, what would other widths hold?"""

from functools import cache
from pathlib import Path

import yaml

from pipeline.errors import InputProblems, RecipeError
from pipeline.fit import Fit, bits_sentence, fit, load_problems
from pipeline.layout import Frozen
from pipeline.recipe import Recipe
from pipeline.spec import ModelSpec
from pipeline.speed import Speed, speed
from pipeline.target import Target

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, faster where libyaml is there


class Served(Frozen):
    """`widths` says up to which batch each width of weights serves that context, and from where a narrower one is needed."""

    fit: Fit
    speed: Speed | None  # None: the target states no peak
    widths: str

    def sentences(self) -> list[str]:
        return [*self.fit.sentences(), *(self.speed.sentences() if self.speed else []), self.widths]

    @property
    def problem(self) -> str:
        """Why it cannot be served, and what would change that; empty where it can."""
        return "" if self.fit.fits else "; ".join([f"serve: {self.fit.sentences()[0]}", *self.fit.sentences()[1:]])


def served(spec: ModelSpec, recipe: Recipe, resources: Path) -> Served | None:
    """None where the recipe states no load. RecipeError where the load or the target makes no sense."""
    load, target = recipe.serve, recipe.target
    if load is None:
        return None
    try:
        found = fit(spec, target, load.context, load.batch)
        if not found.fits:
            found = fit(spec, target, load.context, load.batch, known_targets(resources))
        return Served(fit=found, speed=speed(spec, target, load.context, load.batch), widths=bits_sentence(spec, target, load.context))
    except InputProblems as error:
        raise RecipeError(error.problems) from None


def senseless(spec: ModelSpec, recipe: Recipe) -> list[str]:
    """What is wrong with the load whatever the stages make of the source model, of which `spec` is."""
    problems = load_problems(spec, recipe.target, recipe.serve.context) if recipe.serve else ()
    return [problem for problem in problems if not problem.startswith("target.gpus")]  # stages change the number of KV heads


@cache
def known_targets(resources: Path) -> dict[str, Target]:
    """The machines that come with llmpress, by name, this one aside."""
    files = [file for file in sorted((resources / "conf" / "target").glob("*.yaml")) if file.stem != "host"]
    return {file.stem: Target.model_validate(yaml.load(file.read_bytes(), Loader=LOADER)) for file in files}
