"""What this installation is: whether it has the libraries that stages need, asked before anything runs, so that none ends in an import
error; and how another interpreter finds it."""

import os
import site
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import PlanError
from pipeline.identity import not_installed, to_install
from pipeline.stage import Stage


def check_installed(stages: Mapping[str, Stage]) -> None:
    """PlanError for stages, by the names of their nodes, that need a library which is not installed."""
    problems = [
        f"stages.{name}: {absent}, so that it can be planned but not run; install {to_install(stage.libraries)}, or write mode=plan"
        for name, stage in stages.items()
        if (absent := not_installed(stage.libraries))
    ]
    if problems:
        raise PlanError(problems)


def package_path() -> dict[str, str]:
    """PYTHONPATH for another interpreter to import this very package, wherever it came from; nothing where it is installed."""
    root = str(Path(__file__).resolve().parent.parent)
    if root in site.getsitepackages():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
