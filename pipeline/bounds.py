"""What follows from a measurement: before it a plan knows bounds, after it what will come.

A plan infers what stages make from shapes. One kind of artifact says more than its shape: a `Sensitivity` decides which layer gets how many
bits (stages/runtime/mixed_precision.py). While it is not measured its spec is open, and specs that follow from it are the largest that
they can be; the plan marks them. Once it is in the store, plans read it there, and are exact again. Keys do not depend on any of it.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import MODELS, Artifact, Manifest, Sensitivity
from pipeline.artifact_spec import SensitivitySpec, Spec


def is_open(spec: Spec) -> bool:
    """Whether it waits for a measurement."""
    return isinstance(spec, SensitivitySpec) and spec.divergence is None


def as_made(kind: type[Artifact], folder: Path, manifest: Manifest, expected: Spec) -> Spec:
    """The spec of an artifact that is there."""
    if issubclass(kind, Sensitivity):
        return Sensitivity(folder).measured
    return manifest.spec if issubclass(kind, MODELS) and manifest.spec else expected


def outputs_as_made(types: Mapping[str, type[Artifact]], folder: Path, manifest: Manifest, expected: Mapping[str, Spec]) -> dict[str, Spec]:
    """The specs of all outputs of a stage, by port, from its folder."""
    places = {port: folder if len(types) == 1 else folder / port for port in types}
    return {port: as_made(kind, places[port], manifest, expected[port]) for port, kind in types.items()}
