"""Goldens: behaviour as files in git, so that a change of it is a readable difference.

`UPDATE_GOLDEN=1 make test` rewrites them; read the difference before you commit it.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).parent


def check(name: str, content: str) -> None:
    """Compare with the golden file `name`, or write it where UPDATE_GOLDEN is set."""
    file = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(content, encoding="utf-8")
    assert content == file.read_text(encoding="utf-8"), f"{name} changed; see tests/golden/__init__.py"
