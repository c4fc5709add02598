"""Why a node is not in the store: what is new about it, down to the field, against the most similar execution that is."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Manifest
from pipeline.identity import backend
from pipeline.stage import Stage
from pipeline.store import Store

OTHER_DTYPE = re.compile(r"params\.compute_dtype: (bf16|fp32) -> \w+")  # all that keeps a stored result from being a hit


def explain_miss(store: Store, stage: Stage, inputs: Mapping[str, str]) -> str:
    """What is new against the most similar execution in the store, down to the field."""
    params, computed_by = stage.params.model_dump(mode="json"), backend(stage)
    best: list[str] | None = None
    for _, manifest in store.all(stage.name):
        changes = _changes(manifest, stage, params, inputs, computed_by)
        if best is None or len(changes) < len(best):
            best = changes
    if best is None:
        return "never run"
    if len(best) == 1 and (other := OTHER_DTYPE.fullmatch(best[0])):
        return f"{best[0]}; compute_dtype: {other[1]} takes what is stored"
    return ", ".join(best[:3]) + (f" and {len(best) - 3} more" if len(best) > 3 else "") if best else "its files are damaged"


def _changes(
    manifest: Manifest, stage: Stage, params: Mapping[str, Any], inputs: Mapping[str, str], computed_by: Mapping[str, str]
) -> list[str]:
    changes = [f"input {port}: another one" for port in sorted(inputs) if inputs[port] != manifest.inputs.get(port)]
    pairs = [("params.", params, manifest.params), ("", computed_by, manifest.backend)]
    for prefix, new, old in pairs:
        changes += [
            f"{prefix}{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
            for name in sorted(set(new) | set(old))
            if new.get(name) != old.get(name)
        ]
    if stage.version != manifest.version:
        changes.append(f"version: {manifest.version} -> {stage.version}")
    return changes
