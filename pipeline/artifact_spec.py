"""What is known of an artifact before it is made, of all that are not models: texts, adapters, stored logits and hidden states, measured
sensitivities."""

from typing import Literal

from pipeline.layout import DType, Frozen
from pipeline.spec import ModelSpec

FileFormat = Literal["jsonl", "txt", "parquet", "folder"]
DataFormat = Literal["text", "messages", "tasks"]


class DatasetSpec(Frozen):
    """One split of a dataset: a file of documents, or a folder of evaluation tasks. `digest` is over its content, never over its path.

    Of a hub dataset that is not here yet, the digest is empty and `nbytes` what the hub says of its size.
    """

    split: str
    format: DataFormat = "text"
    file_format: FileFormat | None = None  # how the file is parsed; None: by its suffix
    digest: str
    nbytes: int
    documents: int | None = None  # or conversations; None: not counted
    tasks: tuple[str, ...] = ()  # names of tasks and groups of tasks, of a folder of such
    origin: str = ""  # of a hub dataset: id, config, split, column and commit


class AdapterSpec(Frozen):
    """Low-rank matrices beside a checkpoint's. `nbytes` of tensor data."""

    rank: int
    num_parameters: int
    nbytes: int


class LogitsSpec(Frozen):
    """A teacher's `k` largest logits at each token of `num_samples` windows, cut from the text of digest `data`.

    `temperature` is the one at which the mass of all other tokens is known.
    """

    vocab_size: int
    k: int
    temperature: float
    num_samples: int
    max_length: int
    data: str
    nbytes: int


class StatesSpec(Frozen):
    """A model's final hidden states at every token of a text that is scored. `nbytes` is the most that they take: how many tokens the
    text has is known when it is read."""

    hidden_size: int
    dtype: DType
    nbytes: int


class SensitivitySpec(Frozen):
    """What rounding each unit of a model costs, at each of `choices` bits and in groups of `group_size`; a unit is one module, or `fused`
    those that engines compute in one product.

    `divergence` is KL(model || model with that unit rounded), nats per token, [units][choices]. None: a plan before the measurement,
    which knows of what follows from it only bounds.
    """

    choices: tuple[int, ...]
    group_size: int
    symmetric: bool
    fused: bool
    units: tuple[str, ...]
    divergence: tuple[tuple[float, ...], ...] | None = None


Spec = ModelSpec | DatasetSpec | AdapterSpec | LogitsSpec | StatesSpec | SensitivitySpec | None
