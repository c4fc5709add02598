"""A report for reading: `report.md` and `report.html` in the run's folder, beside report.json.

Drawing the page takes 0.6 to 0.8 s of CPU time, most of it matplotlib's import, which a run that finds everything in the store would take
almost doubled. So both stay as they are where nothing in them would change but the times of the run itself: the page carries a digest of
what it says, in which `hit` counts as `ran`. The import happens here, never when planning.
"""

import logging
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.artifact import TYPES
from pipeline.identity import digest
from pipeline.report import Report
from pipeline.report_table import markdown
from pipeline.store import write_whole

PAGE, TEXT = "report.html", "report.md"
OF_THE_RUN = ("seconds", "planned_seconds", "stages_ran", "stages_hit")  # metrics that a run of hits has otherwise
PLANNED = ("planned_peak", "planned_seconds")  # of a stage, which a run of hits plans without the passes that were shared
HEAD = 2000  # characters of a page among which its mark stands


def write_pages(report: Report, run_dir: Path) -> tuple[Path, list[str]]:
    """The page's path, and a sentence for each plot that it lacks. OSError where the folder cannot be written."""
    page, mark = run_dir / PAGE, content_mark(report)
    if (run_dir / TEXT).exists() and _marked(page, mark):
        return page, []
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would say where it keeps its fonts' cache
    from pipeline.report_html import render

    text, problems = render(report, mark)
    write_whole(page, text)
    write_whole(run_dir / TEXT, markdown(report) + "\n")
    return page, problems


def content_mark(report: Report) -> str:
    """Digest of what a page says, apart from when and how long this run was, and from what spared it work: a run of hits needs none."""
    content: dict[str, Any] = report.model_dump(mode="json", exclude={"created", "seconds"})
    content["metrics"] = {name: value for name, value in report.metrics.items() if name not in OF_THE_RUN}
    content["stages"] = [stage for stage in content["stages"] if not TYPES[stage["type"]].derived]
    for stage in content["stages"]:
        stage["status"] = "ran" if stage["status"] == "hit" else stage["status"]
        stage |= dict.fromkeys(PLANNED)
    return digest("page", {"version": __version__, "report": content})


def _marked(page: Path, mark: str) -> bool:
    if not page.exists():
        return False
    with open(page, encoding="utf-8") as stream:
        return mark in stream.read(HEAD)
