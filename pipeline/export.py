"""A run's final model as a folder of its own: `export_to=`, with a model card that says where it came from."""

import re
import shutil
from pathlib import Path

from pipeline.artifact import MANIFEST, Manifest
from pipeline.errors import RecipeError
from pipeline.identity import canonical
from pipeline.plan import Plan


def check_export(folder: Path) -> None:
    """RecipeError unless `folder` is new or empty: an export never overwrites. Found before the run, not after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"export_to: {folder} exists already; name a new folder")


def export_model(plan: Plan, model: Path, folder: Path) -> None:
    """Copy the checkpoint at `model` to `folder` and write its model card. Complete or absent: copied beside, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, ignore=shutil.ignore_patterns(MANIFEST), copy_function=shutil.copyfile)
    (partial / "README.md").write_text(model_card(plan, Manifest.load(model)), encoding="utf-8")
    if folder.exists():
        folder.rmdir()  # empty, as `check_export` saw; fails rather than delete if it no longer is
    partial.rename(folder)


def model_card(plan: Plan, manifest: Manifest) -> str:
    source = plan.recipe.model
    base = source.id or source.path or "unknown"
    license_name = source_license(plan.source.path)
    rows = "\n".join(f"| {step.node} | {step.stage} | `{canonical(step.params)}` |" for step in manifest.history)
    return f"""---
base_model: {base}
license: {license_name or "other"}
tags: [llmpress]
---
Made from `{base}` by llmpress with the recipe `{plan.recipe.name}`.
Licence of the source model, which governs this one too: {license_name or "not stated in its folder"}.

| node | stage | parameters |
|---|---|---|
{rows}

Key `{manifest.key}`.
"""


def source_license(folder: Path) -> str | None:
    """The `license:` of the source's own model card."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    return found[1] if found else None
