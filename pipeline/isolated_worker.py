"""The isolated interpreter's side of a call (pipeline/isolated.py): `call.json` in, `response.json` out.

Imports nothing but pydantic until it imports the function, whose module may then import its backend at the top: what is resident
after that counts as libraries, not as the backend's work.
"""

import faulthandler
import importlib
import sys
import traceback
from pathlib import Path

from pipeline.isolated import Call, Failed, Returned
from pipeline.parent import end_with_parent
from pipeline.stage import Context
from pipeline.usage import environment, peak_rss, peak_vram, resident
from pipeline.worker import EXIT_CODES, EventLog, explain


def answer(folder: Path) -> int:
    """Make the call of `folder` and write its response. Returns the exit code."""
    faulthandler.enable()
    response: Returned | Failed
    try:
        call = Call.model_validate_json((folder / "call.json").read_bytes())
        module, _, name = call.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        floor = resident()
        with open(call.events, "a", encoding="utf-8") as stream:
            value = function(Context(call.output, EventLog(stream).emit), **call.arguments)
        response = Returned(value=value, environment=environment(), peak_rss=peak_rss(), floor_rss=floor, peak_vram=peak_vram())
        code = 0
    except BaseException as error:  # SystemExit too, which one loader is known to raise: what ended it must become a sentence
        traceback.print_exc()
        kind, message = explain(error)
        response, code = Failed(kind=kind, message=message, peak_rss=peak_rss()), EXIT_CODES[kind]
    temporary = folder / "response.tmp"
    temporary.write_text(response.model_dump_json(), encoding="utf-8")
    temporary.rename(folder / "response.json")
    return code


def main() -> int:
    """`python -m pipeline.isolated_worker <folder> <pid of the stage's process>`"""
    end_with_parent(int(sys.argv[2]))
    return answer(Path(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
