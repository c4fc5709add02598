"""What can go wrong, by whose hand, and the exit code that says so.

A message is one sentence: what is wrong, where (`stage.field`), what to write instead. Problems that can be found
together are raised together: `RecipeError` and `PlanError` carry a list of them.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class LlmpressError(Exception):
    """Base of everything a user may see; never shown with a traceback."""

    exit_code = 1
    told = False  # whether it has been printed

    def __reduce__(self) -> tuple[Callable[..., "LlmpressError"], tuple[Any, ...]]:
        """Errors come back from other processes: pickle would call the constructor with the message alone."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[LlmpressError], arguments: tuple[Any, ...], content: dict[str, Any]) -> LlmpressError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(content)
    return error


class RecipeError(LlmpressError):
    """You wrote it wrong: an unknown name, a value out of range, an order whose types do not fit."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputProblems(ValueError):
    """Several reasons why a stage cannot take its input, found together by `infer`."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class PlanError(RecipeError):
    """It is well-formed but cannot fit or run there."""

    exit_code = 3


class StageFailed(LlmpressError):
    """A stage broke while running. `log` is the file that holds everything it printed."""

    exit_code = 4

    def __init__(self, node: str, reason: str, *, key: str = "", log: str = "", tail: str = ""):
        self.node, self.reason, self.key, self.log, self.tail = node, reason, key, log, tail
        super().__init__(f"{node}: {reason}" + (f" (log: {log})" if log else ""))


class StoreError(LlmpressError):
    """The outputs folder is not what it claims to be, cannot be written, or its disk is full."""

    exit_code = 5


class GateFailed(LlmpressError):
    """A quality gate said no. The model that it judged is kept; `node` is the gate's."""

    exit_code = 6

    def __init__(self, node: str, sentence: str):
        self.node = node
        super().__init__(f"{node}: {sentence}")


class Interrupted(LlmpressError):
    """Ctrl-C or SIGTERM: what had been published stays, the running stage is stopped."""

    exit_code = 130


def sentences(error: LlmpressError) -> str:
    """What is printed of it: a line for each problem."""
    problems = error.problems if isinstance(error, RecipeError) else [str(error)]
    return "\n".join(f"error: {problem}" for problem in problems)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'gptq'?` when something is close, else `; there are: awq, gptq`."""
    known = sorted(known)
    longer = [name for name in known if word and name.startswith(word)]
    close = longer[-1:] or difflib.get_close_matches(word, known, n=1)  # of `a100_40gb` and `a100_80gb`, the larger
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there are: {', '.join(known)}" if known else ""
