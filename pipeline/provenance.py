"""What is recorded of a finished node: the content of its `artifact.json`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline.artifact import GGUF_FILE, MEASUREMENTS, MODELS, Artifact, Export, Manifest, Provenance, tokenizer_digest
from pipeline.gguf_file import read_gguf
from pipeline.headers import tensor_table
from pipeline.identity import backend
from pipeline.plan import PlannedNode
from pipeline.spec import ModelSpec
from pipeline.stage_code import fingerprint
from pipeline.store import file_records
from pipeline.worker import Success


def build_manifest(
    node: PlannedNode,
    folder: Path,
    made: Success,
    *,
    notes: Sequence[str],
    history: tuple[Provenance, ...],
    read: Mapping[str, str],
    resumes: int,
) -> Manifest:
    """The manifest of what `node` left in `folder`. What the worker has hashed is not read again, unless it was touched since.

    `history` are the stages that were applied to its input model, `read` the digests of its inputs' bytes by port, `resumes` how often
    an interrupted attempt was continued.
    """
    stage = node.stage
    single = len(node.types) == 1
    checkpoint = next((port for port, kind in node.types.items() if issubclass(kind, MODELS)), None)
    model = (folder if single else folder / checkpoint) if checkpoint else None
    spec = node.expected[checkpoint] if checkpoint else None
    is_report = all(issubclass(kind, MEASUREMENTS) for kind in node.types.values())
    params = stage.params.model_dump(mode="json")
    return Manifest(
        type=next(iter(node.types.values())).__name__,
        key=node.key,
        stage=stage.name,
        version=stage.version,
        params=params,
        inputs=dict(node.input_keys),
        backend=backend(stage),
        spec=spec if isinstance(spec, ModelSpec) else None,
        outputs={} if single else {port: kind.__name__ for port, kind in node.types.items()},
        history=(*history, Provenance(node=node.name, stage=stage.name, key=node.key, params=params)),
        resumes=resumes,
        tokenizer=tokenizer_digest(model) if model else None,
        read=dict(read) if is_report else {},  # a checkpoint's key stands for its computation, a report's for its subject
        metrics=_metrics(made, single),
        notes=(*node.notes, *notes),
        files=file_records(folder, made.files),
        environment=made.environment,
        execution=stage.execution.model_dump(mode="json"),
        fingerprint=fingerprint(type(stage).__module__),
        seconds=made.seconds,
        peak_rss=made.peak_rss,
        floor_rss=made.floor_rss,
        peak_vram=made.peak_vram,
        tensor_bytes=_tensor_bytes(node.types[checkpoint], model) if checkpoint and model else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _tensor_bytes(kind: type[Artifact], model: Path) -> int:
    """As the files' headers say."""
    if issubclass(kind, Export):
        return read_gguf(model / GGUF_FILE).tensor_bytes
    return sum(entry.nbytes for entry in tensor_table(model).values())


def _metrics(made: Success, single: bool) -> dict[str, float]:
    """By name; `port.name` where a stage has several outputs."""
    return {name if single else f"{port}.{name}": value for port, output in made.outputs.items() for name, value in output.metrics.items()}
