"""What flows between stages: typed folders, each with an `artifact.json` that says what it is and where it came from.

Types are nominal and few, and legal order is their subtype relation:

    Artifact > Checkpoint > DenseCheckpoint | QuantizedCheckpoint
             > Export           a model in another program's file format, which no other stage changes
             > Adapter          low-rank weights for a checkpoint, as peft saves them
             > Dataset
             > TeacherLogits    what a teacher said of a text
             > Sensitivity      what rounding each part of a checkpoint costs
             > HiddenStates     what a checkpoint computes of a text, below its output embedding
             > EvalReport       how good a checkpoint is
             > Benchmark        how fast one is, and how much memory it takes, on one machine

A checkpoint is an ordinary Hugging Face folder; `artifact.json` stands beside its files and is written last, so its
existence means that the folder is whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.artifact_spec import DataFormat, DatasetSpec, FileFormat, SensitivitySpec, Spec
from pipeline.documents import Message, read_conversations, read_documents
from pipeline.headers import read_json
from pipeline.kv_sidecar import read_cache
from pipeline.layout import Frozen
from pipeline.spec import ModelSpec

MANIFEST = "artifact.json"
GGUF_FILE = "model.gguf"
SENSITIVITY_FILE = "sensitivity.json"
SUFFIXES: dict[str, FileFormat] = {".jsonl": "jsonl", ".txt": "txt", ".parquet": "parquet"}


class FileRecord(Frozen):
    nbytes: int
    sha256: str


class Provenance(Frozen):
    """One stage that was applied on the way to an artifact."""

    node: str
    stage: str
    key: str
    params: dict[str, Any]


class Manifest(Frozen):
    """`artifact.json`. Only `key` is identity; everything below `environment` is provenance."""

    schema_version: Literal[1] = 1
    type: str
    key: str
    stage: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, str]
    backend: dict[str, str]
    spec: ModelSpec | None = None
    outputs: dict[str, str] = {}  # port -> artifact type, for a stage with several
    history: tuple[Provenance, ...] = ()
    resumes: int = 0  # how often it was continued after an interruption
    tokenizer: str | None = None
    read: dict[str, str] = {}  # port -> digest of the bytes a report was computed from
    metrics: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    files: dict[str, FileRecord]
    environment: dict[str, str]
    execution: dict[str, Any]
    fingerprint: str
    seconds: float
    peak_rss: int
    floor_rss: int | None = None  # of it, what was resident before the stage began: interpreter and libraries. None: not known
    peak_vram: int | None = None  # reserved by torch; None: no GPU was used
    tensor_bytes: int | None = None  # of a checkpoint, as its files' headers say
    created: str

    @property
    def peak_ram(self) -> int | None:
        """Bytes that the stage itself took at most, which is what a plan predicts. None: not known."""
        return None if self.floor_rss is None else max(self.peak_rss - self.floor_rss, 0)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """ValueError (pydantic's or json's) where the file is no manifest; OSError where there is none."""
        return cls.model_validate_json((folder / MANIFEST).read_bytes())


@dataclass(frozen=True)
class Artifact:
    """A folder on disk, ready to be read. `metrics` is what a stage wants recorded of it."""

    path: Path
    spec: Spec = None
    key: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    port: ClassVar[str] = "artifact"  # what its output is called in references such as `prune.model`
    derived: ClassVar[bool] = False  # it only spares its readers work on their other inputs: no part of their keys, removed by any gc


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """A Hugging Face folder that stock `AutoModelForCausalLM.from_pretrained` loads."""

    port: ClassVar[str] = "model"

    @property
    def model_spec(self) -> ModelSpec:
        """As it was given, else as the folder's files say."""
        if isinstance(self.spec, ModelSpec):
            return self.spec
        cache = read_cache(self.path)
        return ModelSpec.from_config(self.config).with_cache(cache.mode if cache else None)

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")


@dataclass(frozen=True)
class DenseCheckpoint(Checkpoint):
    """Every weight in bf16, fp16 or fp32."""


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """Linear weights packed to fewer bits, in a format of compressed-tensors or bitsandbytes."""


@dataclass(frozen=True)
class Export(Artifact):
    """A GGUF file that llama.cpp runs, `model.gguf`, with the tokenizer's own files beside it."""

    port: ClassVar[str] = "model"

    @property
    def model_spec(self) -> ModelSpec:
        assert isinstance(self.spec, ModelSpec), "an export is made by a stage, which gave it a spec"
        return self.spec

    @property
    def file(self) -> Path:
        return self.path / GGUF_FILE


@dataclass(frozen=True)
class Dataset(Artifact):
    """One split of documents or of conversations, in a file (pipeline/documents.py), or a folder of tasks (pipeline/task_names.py)."""

    port: ClassVar[str] = "data"

    @property
    def file_format(self) -> FileFormat:
        """As its spec says: the path may be that of a link's target or of a copy, named otherwise."""
        if isinstance(self.spec, DatasetSpec) and self.spec.file_format:
            return self.spec.file_format
        return SUFFIXES.get(self.path.suffix, "txt")

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield (id, text) of a `text` split. ValueError as of `read_documents`."""
        if self.format != "text":
            held = "conversations" if self.is_chat else "evaluation tasks"
            raise ValueError(f"{self.path.name} holds {held} (format: {self.format}); plain text is needed here")
        return read_documents(self.path, self.file_format)

    def conversations(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield (id, [{"role", "content"}, ...]) of a `messages` split. ValueError as of `read_conversations`."""
        return read_conversations(self.path, self.file_format)

    @property
    def format(self) -> DataFormat:
        return self.spec.format if isinstance(self.spec, DatasetSpec) else "text"

    @property
    def is_chat(self) -> bool:
        return self.format == "messages"


@dataclass(frozen=True)
class Adapter(Artifact):
    """Low-rank weights beside a checkpoint, in a folder as peft's `PeftModel.from_pretrained` reads it."""

    port: ClassVar[str] = "adapter"


@dataclass(frozen=True)
class TeacherLogits(Artifact):
    """A teacher's largest logits at every token of a text (stages/runtime/teacher_logits.py), read in its place."""

    port: ClassVar[str] = "logits"


@dataclass(frozen=True)
class Sensitivity(Artifact):
    """`sensitivity.json`: a `SensitivitySpec` with what was measured."""

    port: ClassVar[str] = "sensitivity"

    @property
    def measured(self) -> SensitivitySpec:
        """pydantic.ValidationError where the file is none."""
        return SensitivitySpec.model_validate_json((self.path / SENSITIVITY_FILE).read_bytes())


@dataclass(frozen=True)
class HiddenStates(Artifact):
    """A model's final hidden states over a text (stages/runtime/states_layout.py), read in place of the forward pass."""

    port: ClassVar[str] = "states"
    derived: ClassVar[bool] = True


@dataclass(frozen=True)
class EvalReport(Artifact):
    """`report.json`: quality of one checkpoint, with per-document losses so that two reports can be paired."""

    port: ClassVar[str] = "report"


@dataclass(frozen=True)
class Benchmark(Artifact):
    """`benchmark.json`: speed and memory of one checkpoint with one engine on one machine."""

    port: ClassVar[str] = "benchmark"


@dataclass(frozen=True)
class Verdict(Artifact):
    """`verdict.json`: whether a metric is within its limit (pipeline/verdict.py)."""

    port: ClassVar[str] = "verdict"


MODELS = (Checkpoint, Export)  # what a pipeline is for
MEASUREMENTS = (HiddenStates, EvalReport, Benchmark, Verdict)  # they say something of a model and make none

TYPES: dict[str, type[Artifact]] = {
    cls.__name__: cls
    for cls in (Artifact, *MODELS, DenseCheckpoint, QuantizedCheckpoint, Adapter, Dataset, TeacherLogits, Sensitivity, *MEASUREMENTS)
}
DERIVED = frozenset(name for name, cls in TYPES.items() if cls.derived)  # whose nodes a plan may do without at any time


def sha256_file(file: Path) -> str:
    with open(file, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's files say how it reads conversations."""
    files = [folder / "chat_template.jinja", folder / "chat_template.json", *folder.glob("additional_chat_templates/*.jinja")]
    if any(file.exists() for file in files):
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(read_json(config).get("chat_template"))


def tokenizer_digest(folder: Path) -> str | None:
    """Digest of what decides token ids: model, normalizer, pre-tokenizer and added tokens; None without tokenizer.json.

    Not over the file, which every re-saving library formats its own way. CheckpointFileError where it is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_json(file)
    parts = {name: content.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
