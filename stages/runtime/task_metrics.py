"""What text a model writes is worth: metrics that task files name, so that none of them brings code of its own.

Importing this module registers them with lm-evaluation-harness, which knows them by name from then on:

    metric_list: [{metric: python_validity}]

Structured output is where compression shows first: a text may read well and not parse.
"""

import ast
import json
import textwrap
import warnings
from collections.abc import Sequence

import lm_eval.api.metrics  # noqa: F401  # registers the harness' own metrics and means
from lm_eval.api.registry import metric_registry, register_metric

PYTHON_VALIDITY, JSON_VALIDITY = "python_validity", "json_validity"


def python_validity(references: Sequence[str], predictions: Sequence[str], min_statements: int = 1) -> float:
    """1.0 where `predictions[0]` continues the start of a function, `references[0]`, into Python that `ast.parse` accepts, else 0.0.

    The reference is the function's text as far as it was given, from its `def` line (or decorator) on. See `function_body` for where
    the completion ends. With `min_statements` (nested ones count, a docstring does not) `pass` alone is no body.
    """
    body, finished = function_body(references[0], predictions[0])
    written = [body] if finished else [body, body.rpartition("\n")[0]]
    return float(any(statements(references[0] + part) >= min_statements for part in written))


def function_body(start: str, completion: str) -> tuple[str, bool]:
    """The completion up to the first line that is indented no deeper than the function itself, and whether there is such a line.

    Where there is none the model ran out of tokens, and its last line may be half a line; the score then forgives that line.
    """
    margin, kept = _indent(start), list[str]()
    for number, line in enumerate(completion.split("\n")):
        whole = number > 0 or start.endswith("\n")  # else it goes on with the line of the start
        if whole and line.strip() and _indent(line) <= margin:
            return "\n".join(kept), True
        kept.append(line)
    return "\n".join(kept), False


def _indent(text: str) -> int:
    """Columns before the first line's text."""
    line = text.partition("\n")[0].expandtabs()
    return len(line) - len(line.lstrip())


def statements(text: str) -> int:
    """Of the one function that the text is; 0 where it is something else, no Python, or has a docstring alone."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as an invalid escape in a string: legal
            function = ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null character; the last two: nested too deep
        return 0
    if len(function) != 1 or not isinstance(function[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    body = function[0].body[ast.get_docstring(function[0], clean=False) is not None :]
    return sum(isinstance(node, ast.stmt) for statement in body for node in ast.walk(statement))


def json_validity(references: Sequence[str], predictions: Sequence[str]) -> float:
    """1.0 where `references[0]`, the start of a JSON value (which may be empty), and `predictions[0]` begin with a whole one, else 0.0.

    What follows the value does not count. NaN and Infinity are no JSON.
    """
    try:
        json.JSONDecoder(parse_constant=_refuse).raw_decode((references[0] + predictions[0]).lstrip())
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


for _name, _metric in ((PYTHON_VALIDITY, python_validity), (JSON_VALIDITY, json_validity)):
    if _name not in metric_registry:
        register_metric(metric=_name, higher_is_better=True, output_type="generate_until", aggregation="mean")(_metric)
