"""What a sweep leaves in its folder for reading: `sweep.html` and `sweep.md`, and `sweep.json` for scripts.

The page is drawn with matplotlib, whose import takes longer than all the rest; it happens here, never when planning.
"""

import logging
from pathlib import Path

from pipeline.store import write_whole
from pipeline.sweep.report import SweepReport
from pipeline.sweep.table import PAGE, markdown

TEXT, DATA = "sweep.md", "sweep.json"
FILES = (PAGE, TEXT, DATA)


def write_sweep(report: SweepReport, folder: Path) -> list[str]:
    """A sentence for each plot that the page lacks. OSError where the folder cannot be written."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would say where it keeps its fonts' cache
    from pipeline.sweep.html import render

    text, problems = render(report)
    write_whole(folder / DATA, report.model_dump_json(indent=1) + "\n")
    write_whole(folder / TEXT, markdown(report) + "\n")
    write_whole(folder / PAGE, text)
    return problems
