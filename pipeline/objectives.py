"""What a job returns to Hydra: its metrics or, with `objectives: [perplexity, nbytes]`, these alone, for a sweeper that optimizes them."""

from collections.abc import Mapping

from pipeline.errors import RecipeError, did_you_mean

Returned = dict[str, float] | tuple[float, ...] | float


def objectives(metrics: Mapping[str, float], names: tuple[str, ...] | None) -> Returned:
    """All metrics where no objective is named; several as a tuple in the order they are named, one alone as a float.

    RecipeError for names that the run did not measure.
    """
    if names is None:
        return dict(metrics)
    problems = [f"objectives: the run has no metric '{name}'{did_you_mean(name, metrics)}" for name in names if name not in metrics]
    if problems:
        raise RecipeError(problems)
    values = tuple(metrics[name] for name in names)
    return values[0] if len(values) == 1 else values
