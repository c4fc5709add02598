"""Errors as they travel between processes."""

import pickle

import pytest

from pipeline.errors import GateFailed, Interrupted, LlmpressError, PlanError, RecipeError, StageFailed


@pytest.mark.parametrize(
    "error",
    [
        StageFailed("quantize", "broke", key="k", log="/log", tail="last words"),
        GateFailed("gate@quantize", "gate fails"),
        RecipeError(["one", "two"]),
        PlanError("too large"),
        Interrupted("stopped"),
    ],
)
def test_an_error_is_the_same_after_it_came_from_another_process(error: LlmpressError) -> None:
    error.told = True
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error) and back.exit_code == error.exit_code
