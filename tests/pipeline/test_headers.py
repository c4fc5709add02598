"""Tensor tables from real files, and a sentence for every way a checkpoint folder can be broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.headers import CheckpointFileError, read_header, tensor_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(3, 4, dtype=torch.bfloat16), "b": torch.ones(5)}, tmp_path / "model.safetensors")
    return tmp_path


def test_the_table_places_every_tensor(folder: Path) -> None:
    table = tensor_table(folder)
    assert {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in table.items()} == {
        "a": ("BF16", (3, 4), 24),
        "b": ("F32", (5,), 20),
    }
    entry = table["b"]
    raw = entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == [1.0] * 5


def test_only_the_files_that_the_index_names_are_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    save_file({"consolidated": torch.ones(1)}, folder / "consolidated.safetensors")
    weight_map = {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(tensor_table(folder)) == ["a", "b"]


def test_a_truncated_file_is_found_from_its_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointFileError, match=r"is truncated: .* copy it again"):
        tensor_table(folder)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (20).to_bytes(8, "little") + b"{" * 20])
def test_bytes_that_are_no_safetensors_are_said_so(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointFileError, match=r"not a safetensors file|unreadable safetensors header"):
        read_header(file)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointFileError, match=r"only pickled weights \(pytorch_model.bin\)"):
        tensor_table(tmp_path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "c": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointFileError, match=r"lacks model-2\.safetensors"):
        tensor_table(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))
    assert tensor_table(folder)["a"].file == folder / "model.safetensors"
