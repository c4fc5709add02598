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


def index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index(folder, {"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}})
    with pytest.raises(CheckpointFileError, match=r"lacks model-2\.safetensors"):
        tensor_table(folder)


def test_beside_an_index_a_whole_file_is_preferred_as_transformers_does(folder: Path) -> None:
    save_file({"other": torch.ones(1)}, folder / "model-1.safetensors")
    index(folder, {"weight_map": {"other": "model-1.safetensors"}})
    assert sorted(tensor_table(folder)) == ["a", "b"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hosts", "sub/model.safetensors", "..", "."])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"weight_map": {"a": name}})
    with pytest.raises(CheckpointFileError, match="which is not a file of its folder"):
        tensor_table(tmp_path)


@pytest.mark.parametrize("content", [[1], 5, {}, {"weight_map": {"a": 5}}, {"weight_map": ["a"]}, {"weight_map": {}}])
def test_an_index_that_is_none_is_said_so(tmp_path: Path, content: object) -> None:
    index(tmp_path, content)
    with pytest.raises(CheckpointFileError, match=r"index\.json is not a .*; copy it again"):
        tensor_table(tmp_path)


ROW = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "row",
    [
        None, [], {}, {"shape": [1], "data_offsets": [0, 4]}, ROW | {"dtype": 5}, ROW | {"shape": 1}, ROW | {"shape": ["1"]},
        ROW | {"shape": [True]}, ROW | {"shape": [-1]}, ROW | {"data_offsets": ["0", "4"]}, ROW | {"data_offsets": [0]},
        ROW | {"data_offsets": [-4, 0]}, ROW | {"data_offsets": None},
    ],
)  # fmt: skip
def test_a_header_row_of_another_form_is_named(tmp_path: Path, row: object) -> None:
    write_header(tmp_path, json.dumps({"weird": row}))
    with pytest.raises(CheckpointFileError, match="tensor weird has no dtype, shape and data_offsets in the header; copy it again"):
        tensor_table(tmp_path)


@pytest.mark.parametrize("header", ["[1]", "5", "null", "[" * 100_000, '{"a":' * 100_000])
def test_a_header_that_is_no_object_is_unreadable(tmp_path: Path, header: str) -> None:
    write_header(tmp_path, header)
    with pytest.raises(CheckpointFileError, match="unreadable safetensors header"):
        tensor_table(tmp_path)


def write_header(folder: Path, header: str) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
