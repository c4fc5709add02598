"""The two tables of a checkpoint that have a row for each word: its embedding and its output embedding, read in slices."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.artifact import Checkpoint
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from stages.runtime.packing import packed_formats, unpack_weight
from stages.runtime.tensors import TensorReader
from stages.runtime.windows import VOCABULARY_ROWS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Vocabulary:
    """Rows come on the CPU in `dtype`."""

    def __init__(self, reader: TensorReader, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.reader, self.spec, self.dtype = reader, spec, dtype
        self.head = EMBEDDING if spec.architecture.tied else HEAD
        self.formats = packed_formats(spec)  # by module, of the whole model

    def slices(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of the embedding or head. A packed head, which hardly anyone makes, is unpacked whole."""
        module = name.removesuffix(".weight")
        form = self.formats.get(module)
        whole = unpacked(self.reader, module, form, self.spec, self.dtype) if form is not None else None
        for first in range(0, self.spec.architecture.vocab_size, VOCABULARY_ROWS):
            rows = (first, first + VOCABULARY_ROWS)
            yield first, self.reader.read(name, rows).to(self.dtype) if whole is None else whole[slice(*rows)]

    def output_embedding(self, device: torch.device) -> torch.Tensor:
        """[vocabulary, H], whole, on `device`."""
        rows = [rows.to(device) for _, rows in self.slices(self.head)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpacked(reader: TensorReader, module: str, form: WeightFormat, spec: ModelSpec, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight in `dtype`."""
    packed = {suffix: reader.read(f"{module}.{suffix}") for suffix in form.tensors((1, 1), spec.dtype)}
    return unpack_weight(packed, form, dtype)


def read_output_embedding(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[vocabulary, H] in `dtype`, of a checkpoint whose head does not round what it is multiplied with."""
    spec = Checkpoint(folder).model_spec
    return Vocabulary(TensorReader(folder), spec, dtype).output_embedding(device)
