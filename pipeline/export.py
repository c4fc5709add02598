"""A run's final model as a folder of its own: `export_to=`, with a model card that says where it came from."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import MANIFEST, Manifest
from pipeline.errors import RecipeError, StoreError
from pipeline.graph import SOURCE_MODEL
from pipeline.identity import canonical
from pipeline.plan import Plan
from pipeline.serving import write_serving
from pipeline.store import explain_os_error


def check_export(plan: Plan, folder: Path) -> None:
    """RecipeError unless the recipe makes a model and `folder` can become it: an export never overwrites. Found before the run."""
    if plan.final == SOURCE_MODEL:
        raise RecipeError("export_to: the recipe makes no model; add a stage that does to `order`")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"export_to: {folder} exists already; name a new folder")
    existing = next(parent for parent in folder.parents if parent.exists())
    try:
        Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=existing)).rmdir()
    except OSError as error:
        raise RecipeError(f"export_to: {folder} cannot be made ({error.strerror}); name another folder") from None


def export_model(plan: Plan, model: Path, manifest: Manifest, folder: Path, metrics: Mapping[str, float]) -> None:
    """Copy the checkpoint at `model` to `folder`, with a model card and `serving.yaml`. Complete or absent: copied beside, then renamed."""
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        shutil.copytree(model, partial, ignore=shutil.ignore_patterns(MANIFEST), copy_function=shutil.copyfile, dirs_exist_ok=True)
        (partial / "README.md").write_text(model_card(plan, manifest), encoding="utf-8")
        write_serving(partial, plan.final_spec, str(folder), metrics)
        partial.chmod(0o755)
        partial.rename(folder)  # replaces an empty folder, fails on any other
    except OSError as error:
        raise StoreError(f"export_to: {explain_os_error(error, folder)}") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def model_card(plan: Plan, manifest: Manifest) -> str:
    source = plan.recipe.model
    base = source.path or source.id or "unknown"
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
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None
