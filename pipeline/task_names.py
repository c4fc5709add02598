"""What a folder of lm-evaluation-harness tasks holds, from its files alone, so that a plan can name a task that is not there.

YAML files are parsed and their tags (`!function`) left as they are: nothing is run, and what a task may do is the evaluating stage's
matter (stages/runtime/task_folder.py).
"""

from pathlib import Path

import yaml

SKIPPED = ("__pycache__", ".ipynb_checkpoints", ".git")


def task_files(folder: Path) -> dict[str, Path]:
    """Every file of the folder by its name in it, with `/`, whatever the platform; caches and hidden files are no part of it."""
    found = ((file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file())
    kept = ((name, file) for name, file in found if not set(name.parts) & set(SKIPPED) and not name.name.startswith("."))
    return {name.as_posix(): file for name, file in sorted(kept)}


def task_names(files: dict[str, Path]) -> tuple[str, ...]:
    """What an evaluation may name: tasks, groups and tags of the `.yaml` files.

    ValueError: there is none, a task or group twice, or a file that is no YAML.
    """
    places: dict[str, str] = {}
    tags: set[str] = set()
    for place, file in files.items():
        if file.suffix != ".yaml":
            continue
        defined = _scalars(file)
        for name in defined.get("group") or defined.get("task") or []:
            if name in places:
                raise ValueError(f"{places[name]} and {place} both define the task '{name}'; rename or remove one")
            places[name] = place
        tags.update(defined.get("tag") or [])
    if not places:
        raise ValueError("there is no .yaml file with a `task` in it; give a folder of lm-evaluation-harness tasks")
    return tuple(sorted({*places, *tags}))


def _scalars(file: Path) -> dict[str, list[str]]:
    """The file's values that are text, or for tags a list of such, by key. Of a file that others include there may be none."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{file} is not YAML{f' (line {mark.line + 1})' if mark else ''}; mend it") from None
    found: dict[str, list[str]] = {}
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if isinstance(value, yaml.ScalarNode):
            found[key.value] = [value.value]
        elif isinstance(value, yaml.SequenceNode) and key.value == "tag":
            found[key.value] = [item.value for item in value.value if isinstance(item, yaml.ScalarNode)]
    return found
