"""Checkpoints in GPTQ's and AWQ's layouts, written here value by value, come out of the repacking as the numbers that were put in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.layout import WeightFormat
from stages.runtime.packing import unpack_weight
from stages.runtime.repacking import repacker

ROWS, COLUMNS, GROUP = 64, 128, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that stands at each position of a word


def word(values: list[int], bits: int) -> int:
    total = sum(value << (bits * place) for place, value in enumerate(values))
    return total - (1 << 32) if total >= 1 << 31 else total


def words(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[rows, n] to [rows, n * bits / 32] int32, one value after another."""
    per = 32 // bits
    order = order or tuple(range(per))
    rows = [[word([row[at + place] for place in order], bits) for at in range(0, len(row), per)] for row in values.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def draw(bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers [rows, columns], zero points and scales [rows, groups], as the files of other libraries count them: from 0."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(1, 2**bits, (ROWS, COLUMNS // GROUP), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    return integers, zeros, (torch.rand(ROWS, COLUMNS // GROUP, generator=generator) + 0.5).half()


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4, "group_size": GROUP} | config}))


def save_gptq(folder: Path, bits: int, symmetric: bool, first: bool, **changes: torch.Tensor) -> torch.Tensor:
    integers, zeros, scales = draw(bits, symmetric)
    tensors = {
        "qweight": words(integers, bits).T,
        "qzeros": words((zeros - int(first)).T, bits),
        "scales": scales.T,
        "g_idx": torch.arange(COLUMNS, dtype=torch.int32) // GROUP,
    }
    config = {"quant_method": "gptq", "bits": bits} | ({} if first else {"checkpoint_format": "gptq_v2"})
    save(folder, tensors | changes, config)
    return (integers - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first format", "v2"])
def test_gptq_files_come_out_as_the_weights_that_were_put_in(tmp_path: Path, bits: int, symmetric: bool, first: bool) -> None:
    weight = save_gptq(tmp_path / "saved", bits, symmetric, first)
    form = WeightFormat(num_bits=bits, group_size=GROUP, symmetric=symmetric)
    made = repacker(tmp_path / "saved", form, torch.float32)("layer")
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        name: shape for name, (_, shape) in form.tensors((ROWS, COLUMNS), "F32").items()
    }
    assert torch.equal(unpack_weight(made, form, torch.float32), weight)


def test_awq_files_come_out_as_the_weights_that_were_put_in(tmp_path: Path) -> None:
    integers, zeros, scales = draw(4, symmetric=False)
    tensors = {"qweight": words(integers.T, 4, AWQ_ORDER), "qzeros": words(zeros.T, 4, AWQ_ORDER), "scales": scales.T}
    save(tmp_path / "saved", tensors, {"quant_method": "awq", "version": "gemm"})
    form = WeightFormat(num_bits=4, group_size=GROUP, symmetric=False)
    made = repacker(tmp_path / "saved", form, torch.float32)("layer")
    expected = (integers - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    assert torch.equal(unpack_weight(made, form, torch.float32), expected)


def test_the_order_of_awqs_words_is_what_compressed_tensors_reads() -> None:
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    from stages.functional.int32_words import AWQ_POSITION

    assert list(AWQ_POSITION) == AutoAWQConverter.AWQ_REVERSE_ORDER


def reordered(folder: Path) -> None:
    save_gptq(folder, 4, True, True, g_idx=torch.arange(COLUMNS, dtype=torch.int32).flip(0) // GROUP)


def zero_of_nought(folder: Path) -> None:
    stored = words(torch.full((COLUMNS // GROUP, ROWS), 15), 4)  # 0 less one, in all bits
    save_gptq(folder, 4, False, True, qzeros=stored)


def off_the_middle(folder: Path) -> None:
    save_gptq(folder, 4, True, False, qzeros=words(torch.full((COLUMNS // GROUP, ROWS), 7), 4))


def other_bits(folder: Path) -> None:
    save_gptq(folder, 8, True, True)


def other_method(folder: Path) -> None:
    save(folder, {"qweight": torch.zeros(1, 1)}, {"quant_method": "bitsandbytes"})


@pytest.mark.parametrize(
    ("write", "sentence", "symmetric"),
    [
        (reordered, "reordered across groups", True),
        (zero_of_nought, "zero point of 0.*write symmetric: true", False),
        (off_the_middle, "beside the middle of its range", True),
        (other_bits, "saved 8 bits in groups of 32, not 4 in groups of 32", True),
        (other_method, "method bitsandbytes; gptq and awq are read", True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_layout_cannot_express_is_refused(tmp_path: Path, write: Callable[[Path], None], sentence: str, symmetric: bool) -> None:
    write(tmp_path / "saved")
    with pytest.raises(ValueError, match=sentence):
        repacker(tmp_path / "saved", WeightFormat(num_bits=4, group_size=GROUP, symmetric=symmetric), torch.float32)("layer")
