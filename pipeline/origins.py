"""Where a run's models and datasets came from: what the recipe wrote, and the key of the content that was found there."""

from pathlib import Path

from pipeline.artifact import Artifact, Checkpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.graph import SOURCE_MODEL, Ref
from pipeline.layout import Frozen
from pipeline.plan import Plan
from pipeline.recipe import Recipe


class Origin(Frozen):
    """One source of the recipe. `key` identifies its content: a digest of a local one's, id and commit of a hub model's."""

    name: str  # as references have it: `model`, `models.large`, `data.eval`
    type: str  # of the artifact: DenseCheckpoint, Dataset, ...
    written: str  # the path as the recipe has it, or hub id and commit
    path: str  # of the file or folder that was read
    key: str
    format: str  # of a model its weights' dtype or packing, of a dataset what it holds and how
    bytes: int  # of tensor data, or of the file
    documents: int | None  # or conversations; None of anything else, or where they were not counted


def origins(plan: Plan) -> tuple[Origin, ...]:
    """Of all that some stage read, the source model first."""
    return tuple(_origin(plan.recipe, ref, artifact) for ref, artifact in plan.sources.items())


def _origin(recipe: Recipe, ref: Ref, artifact: Artifact) -> Origin:
    spec = artifact.spec
    if isinstance(artifact, Checkpoint):
        model = artifact.model_spec
        packed = {group.format.label for group in model.linear_groups if not group.format.is_dense}
        form, nbytes, documents = ", ".join([*sorted(packed), model.dtype]), model.nbytes, None
        written = _written_model(recipe, ref, artifact.path)
    else:
        assert isinstance(spec, DatasetSpec), "sources are models and datasets"
        form, nbytes, documents = f"{spec.format}, {spec.file_format or 'by suffix'}", spec.nbytes, spec.documents
        written = spec.origin or recipe.data.splits[ref.port].path or ""
    return Origin(
        name=str(ref),
        type=type(artifact).__name__,
        written=written,
        path=str(artifact.path),
        key=artifact.key,
        format=form,
        bytes=nbytes,
        documents=documents,
    )


def _written_model(recipe: Recipe, ref: Ref, folder: Path) -> str:
    """`org/name@commit` of a hub model: the hub's cache names a revision's folder for its commit."""
    model = recipe.model if ref == SOURCE_MODEL else recipe.models[ref.port]
    return model.path or (f"{model.id}@{folder.name or model.revision}" if model.id else "an architecture without weights")
