"""`run`: what a command asks for, answered from what was learned before or by asking Hydra, and every error as a sentence.

Nothing heavy is imported here: `run` alone, help, a TAB, and a config that was composed before need no Hydra; it is asked in
pipeline/with_hydra.py. Exit codes are those of `pipeline.errors`.
"""

import os
import signal
import sys
from types import FrameType

from pipeline import completion
from pipeline.errors import Interrupted, LlmpressError, sentences
from pipeline.learned import asks_for_help, learned_help, recall_config
from pipeline.resources import recipe_list


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
        print(recipe_list())
        return 0
    if completion.is_query(arguments) and (candidates := completion.answer(arguments)) is not None:
        print(candidates)
        return 0
    if asks_for_help(arguments) and (text := learned_help(arguments).recall()):
        print(text, end="")
        return 0
    if config := recall_config(arguments):
        from pipeline.modes import carry_out

        carry_out(config)
        return 0
    from pipeline.with_hydra import command

    return command(arguments)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
