"""One look at a file's bytes tells its sha256 and its damaged tensors, whoever wrote it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifact import sha256_file
from pipeline.hashed import known
from pipeline.headers import CheckpointFileError
from stages.runtime.guard import damaged_tensors
from stages.runtime.inspection import BLOCK_BYTES, inspect
from stages.runtime.tensors import TensorReader
from tests.stages.models import save_tensors


def bytes_read() -> int:
    """By this process, from the page cache too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def tensors() -> dict[str, torch.Tensor]:
    """One of several blocks whose very last number is damaged, one of no damage, one of a damaged scalar."""
    large = torch.randn(BLOCK_BYTES // 2 + 7, 3).bfloat16()
    large[-1, -1] = torch.inf
    return {"large": large, "whole": torch.randn(5, 4), "count": torch.tensor([2**31 - 1]), "scalar": torch.tensor(torch.nan)}


def test_a_library_s_file_is_hashed_and_searched_in_one_look(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    before = bytes_read()
    seen = inspect(file)
    assert file.stat().st_size <= bytes_read() - before < 1.1 * file.stat().st_size
    assert (seen.sha256, set(seen.damaged)) == (sha256_file(file), {"large", "scalar"})


def test_what_was_written_here_is_known_without_a_look(tmp_path: Path) -> None:
    reader = TensorReader(save_tensors(tmp_path, tensors()))
    file = tmp_path / "model.safetensors"
    before = bytes_read()
    assert damaged_tensors(reader) == ["large", "scalar"]
    assert bytes_read() - before < file.stat().st_size / 100
    seen = known(file)
    assert seen is not None and seen.sha256 == sha256_file(file)
    os.utime(file)
    before = bytes_read()
    assert damaged_tensors(reader) == ["large", "scalar"]
    assert bytes_read() - before >= file.stat().st_size, "it may be another content by now"


def test_bytes_between_tensors_and_behind_them_are_hashed_too(tmp_path: Path) -> None:
    table = {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
    header = json.dumps(table).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(4)) * 4 + b"more")
    seen = inspect(file)
    assert (seen.sha256, seen.damaged) == (sha256_file(file), ())
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 6)
    with pytest.raises(CheckpointFileError, match="truncated"):
        inspect(file)
