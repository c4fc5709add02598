"""`sweep` of a recipe: alternatives as overrides that Hydra reads back as the same values."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.sweep.axes import axis_problems, overrides

AXES: dict[str, Any] = {
    "order": [["rtn4", "evaluate"], ["gptq4", "evaluate"]],
    "stages.quantize.num_bits": [4, 3],
    "stages.distill.note": ["a, b", "it's", "true"],
    "gates": [[], [{"metric": "perplexity", "max_increase_pct": 5.5}]],
}


def test_hydra_reads_the_values_that_the_recipe_wrote() -> None:
    parsed = OverridesParser.create().parse_overrides(overrides(AXES, []))
    read = {override.key_or_group: [plain(element) for element in override.value().list] for override in parsed}  # type: ignore[union-attr]
    assert read == AXES


def plain(element: Any) -> Any:
    if isinstance(element, list):
        return [plain(item) for item in element]
    if isinstance(element, dict):
        return {str(key): plain(value) for key, value in element.items()}
    return getattr(element, "text", element)


def test_what_the_command_line_names_is_left_to_it() -> None:
    left = overrides(AXES, ["-m", "order=[rtn4]", "stages.quantize.num_bits=2", "+gates=[]"])
    assert [override.partition("=")[0] for override in left] == ["stages.distill.note"]
    assert not any(override.startswith("order=") for override in overrides(AXES, ["hydra/sweeper=orders"]))


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ([1, 2], "sweep: it is a mapping"),
        ({"hydra.launcher": [1, 2]}, "sweep.hydra.launcher: it is not what a recipe may vary"),
        ({"outputs": ["a", "b"]}, "sweep.outputs: it is not what a recipe may vary"),
        ({"stages.a.b": [1]}, "sweep.stages.a.b: it needs a list of two values"),
    ],
)
def test_what_is_no_axis_is_refused(axes: Any, sentence: str) -> None:
    (problem,) = axis_problems(axes)
    assert problem.startswith(sentence)
