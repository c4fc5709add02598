"""The identity of a recipe as a whole, by which its run's folder and its run in MLflow are found again."""

from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Artifact
from pipeline.graph import Ref
from pipeline.identity import digest, non_default
from pipeline.recipe import Recipe


def recipe_digest(recipe: Recipe, sources: Mapping[Ref, Artifact]) -> str:
    """Identity of the recipe and of what it reads: equal ones share a run folder, wherever their files lie and whatever runs them."""
    stages = {
        name: {"stage": config.stage.name, "params": non_default(config.stage.params), "inputs": dict(config.inputs)}
        for name, config in recipe.stages.items()
        if name in recipe.order
    }
    read = {str(ref): artifact.key for ref, artifact in sources.items()}
    asked: dict[str, Any] = {"requantize": True} if recipe.requantize else {}  # a default stays out, as of a stage's parameters
    if recipe.quality.gates:
        asked["gates"] = [[gate.after, non_default(gate.stage.params)] for gate in recipe.quality.gates]
    if probe := recipe.quality.probe:
        asked["probe"] = [probe.after, non_default(probe.stage.params)]
    return digest("recipe", {"order": recipe.order, "stages": stages, "convert": recipe.convert, "sources": read} | asked)
