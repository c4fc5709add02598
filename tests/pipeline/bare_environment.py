"""An interpreter with pydantic and nothing else, as the leanest isolated backend would have."""

import importlib.util
import subprocess
import sys
from pathlib import Path

PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions")


def make_bare_environment(folder: Path) -> Path:
    """A virtual environment without pip; pydantic is linked from this one. Returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = site_packages(folder)
    for name in PYDANTIC:
        found = importlib.util.find_spec(name)
        assert found and found.origin
        origin = Path(found.origin)
        (packages / (name if origin.stem == "__init__" else origin.name)).symlink_to(origin.parent if origin.stem == "__init__" else origin)
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages
