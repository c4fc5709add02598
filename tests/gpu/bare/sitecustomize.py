"""Python imports this at its start where PYTHONPATH names this folder: packages are then as if they were not installed.

LLMPRESS_HIDDEN says which, as JSON: `modules` (top-level names), `distributions` (normalized names), `paths` (entries of sys.path).
Finders are asked as ever and their answers dropped, so that `find_spec` returns None as for a package that is not there.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from typing import Any

HIDDEN = json.loads(os.environ["LLMPRESS_HIDDEN"])
MODULES, DISTRIBUTIONS = set(HIDDEN["modules"]), set(HIDDEN["distributions"])


class Hiding:
    """A finder of sys.meta_path without what is hidden."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in MODULES else self.finder.find_spec(name, path, target)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        find = getattr(self.finder, "find_distributions", None)
        for found in find(context or DistributionFinder.Context()) if find else ():
            if re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower() not in DISTRIBUTIONS:
                yield found


sys.path[:] = [entry for entry in sys.path if entry not in HIDDEN["paths"]]
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
