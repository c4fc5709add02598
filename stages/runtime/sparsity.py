"""Count the zeros of a checkpoint: what a plan says of a sparse model is measured on every checkpoint that is made of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from pipeline.layout import Sparsity
from pipeline.spec import ModelSpec
from stages.runtime.packing import packed_formats, unpack_weight
from stages.runtime.tensors import DTYPES, TensorReader


@dataclass(frozen=True)
class Zeros:
    """In the Linear weights of the decoder layers, as a reader sees them: packed ones are multiplied out."""

    share: float
    problems: list[str]  # where there are fewer than the model's spec says

    @classmethod
    def counted(cls, reader: TensorReader, spec: ModelSpec) -> Self:
        """`spec` says what is expected; its `sparsity` is not None. Holds one weight."""
        assert spec.sparsity is not None, "nothing is expected of it"
        zeros, size, problems = 0, 0, []
        for name, weight in sparse_weights(reader, spec):
            found = int((weight == 0).sum())
            zeros, size = zeros + found, size + weight.numel()
            problems += departures(name, weight, found, spec.sparsity)
        return cls(zeros / size, problems)


def sparse_weights(reader: TensorReader, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, [rows, columns]) of every weight that the spec's sparsity speaks of."""
    formats, dtype = packed_formats(spec), DTYPES[spec.dtype]
    for group in spec.sparse_groups:
        for name in group.module_names:
            if name in formats:
                parts = {suffix: reader.read(f"{name}.{suffix}") for suffix in group.format.tensors((1, 1), spec.dtype)}
                yield name, unpack_weight(parts, formats[name], dtype)
            else:
                yield name, reader.read(f"{name}.weight")


def departures(name: str, weight: torch.Tensor, zeros: int, sparsity: Sparsity) -> list[str]:
    """How a [rows, columns] weight with that many zeros is less sparse than it should be."""
    if zeros < sparsity.zeros(tuple(weight.shape)):
        return [f"{name} is {zeros / weight.numel():.2%} zeros, expected {sparsity.share:.2%}; the stage that made it does not keep zeros"]
    if sparsity.pattern == "2:4" and (broken := int((four_zeros(weight) < 2).sum())):
        return [f"{name} has {broken:,} groups of four with fewer than two zeros; the stage that made it does not keep the pattern 2:4"]
    return []


def four_zeros(weight: torch.Tensor) -> torch.Tensor:
    """[rows, columns / 4]: how many of each four consecutive weights are zero."""
    return (weight == 0).view(len(weight), -1, 4).sum(2)
