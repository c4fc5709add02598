"""What is written is what any safetensors reader reads, byte for byte; what is cut short is refused with a sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import sha256_file
from pipeline.hashed import known
from pipeline.headers import CheckpointFileError, tensor_table
from stages.runtime import inspection, tensors
from stages.runtime.tensors import PAGE, CheckpointWriter, TensorReader, copy_companions
from tests.stages.models import save_tensors as write

TENSORS = {
    "a.weight": torch.randn(7, 5, dtype=torch.bfloat16),
    "a.packed": torch.randint(-(2**31), 2**31 - 1, (3, 4), dtype=torch.int32),
    "a.shape": torch.tensor([3, 32]),
    "b.norm": torch.randn(9),
    "b.scalar": torch.tensor(2.5, dtype=torch.float16),
    "b.none": torch.empty(0, 4),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_small_shard_limit_gives_several_files_and_a_true_index(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert {name: entry.file.name for name, entry in tensor_table(tmp_path).items()} == index["weight_map"]
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())


def test_data_begins_on_a_page_however_long_the_header_is(tmp_path: Path) -> None:
    for count in (1, 1200):
        many = {f"model.layers.{i}.a_long_name_for_one_small_tensor.weight": torch.full((1,), float(i)) for i in range(count)}
        reader = TensorReader(write(tmp_path / str(count), many))
        assert min(entry.offset for entry in reader.table.values()) % PAGE == 0
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in many.items())


@pytest.mark.parametrize("shard_bytes", [80, 10**9])
def test_what_is_hashed_while_written_is_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(inspection, "BLOCK_BYTES", 16)  # several blocks to a tensor
    damaged = {"c.nan": torch.tensor([[1.0, torch.nan]] * 9), "d.inf": torch.tensor([1.0] * 20 + [-torch.inf]).half()}
    write(tmp_path, TENSORS | damaged, shard_bytes=shard_bytes)
    hashed = {file: known(file) for file in tmp_path.glob("*.safetensors")}
    assert len(hashed) == (5 if shard_bytes == 80 else 1)
    assert all(seen is not None and seen.sha256 == sha256_file(file) for file, seen in hashed.items())
    assert sorted(name for seen in hashed.values() if seen for name in seen.damaged) == ["c.nan", "d.inf"]


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("b", torch.ones(3), r"b comes where a is expected"),
        ("a", torch.ones(4), r"a is F32 \[4\], expected F32 \[3\]"),
        ("a", torch.ones(3).half(), r"a is F16 \[3\], expected F32 \[3\]"),
        ("a", torch.ones(3), r"b is missing"),
    ],
)
def test_what_was_not_announced_is_refused_at_once(tmp_path: Path, name: str, tensor: torch.Tensor, sentence: str) -> None:
    announced = {"a": ("F32", (3,)), "b": ("F32", (3,))}
    with (
        pytest.raises(ValueError, match=f"^the checkpoint is not what was planned: {sentence}$"),
        CheckpointWriter(tmp_path, announced) as writer,
    ):
        writer.add(name, tensor)
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_comes_after_the_last(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="b comes where nothing more is expected"),
        CheckpointWriter(tmp_path, {"a": ("F32", ())}) as writer,
    ):
        writer.add("a", torch.tensor(1.0))
        writer.add("b", torch.tensor(1.0))


def test_non_contiguous_tensors_are_written_in_logical_order(tmp_path: Path) -> None:
    square = torch.arange(12.0).view(3, 4)
    write(tmp_path, {"transposed": square.T, "strided": square[:, ::2]})
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["transposed"], square.T) and torch.equal(loaded["strided"], square[:, ::2])


def test_rows_and_a_buffer_of_ones_own(tmp_path: Path) -> None:
    weight = torch.randn(10, 3, dtype=torch.bfloat16)
    save_file({"before": torch.ones(5), "w": weight}, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.read("w", rows=(4, 7)), weight[4:7])
    assert torch.equal(reader.read("w", rows=(8, 99)), weight[8:])
    buffer = torch.empty(10, 3, dtype=torch.bfloat16)
    assert reader.read("w", out=buffer) is buffer and torch.equal(buffer, weight)


def test_a_copy_is_exact_and_may_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64)  # several blocks, the last one in part
    reader = TensorReader(write(tmp_path / "source", TENSORS | {"c.weight": torch.randn(41, 3)}))
    announced = {f"new.{name}": (entry.dtype, entry.shape) for name, entry in reader.table.items()}
    with CheckpointWriter(tmp_path / "target", announced) as writer:
        for name in reader.table:
            writer.copy(f"new.{name}", reader, name)
    target = TensorReader(tmp_path / "target")
    assert all(torch.equal(target.read(f"new.{name}"), reader.read(name)) for name in reader.table)


def test_files_cut_short_are_refused_with_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    file, reader = tmp_path / "model.safetensors", TensorReader(tmp_path)
    with open(file, "r+b") as stream:
        stream.truncate(PAGE + 40)
    with pytest.raises(CheckpointFileError, match=r"truncated within a\.weight; copy it again"):
        reader.read("a.weight")
    with pytest.raises(CheckpointFileError, match="truncated"):
        TensorReader(tmp_path)
    with pytest.raises(CheckpointFileError, match="has no tensor lm_head"):
        reader.read("lm_head.weight")


def test_an_interrupted_writer_leaves_no_checkpoint_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, shard_bytes=80)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, {"a": ("F32", (3,)), "b": ("F32", (3,))}) as writer:
        writer.add("a", torch.ones(3))
        raise KeyboardInterrupt
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]
    with pytest.raises(CheckpointFileError):
        TensorReader(tmp_path)
    write(tmp_path, {"b": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert list(TensorReader(tmp_path).table) == ["b"]


def test_companions_are_the_tokenizer_and_the_given_config_only(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (source / "additional_chat_templates" / "notes.txt").write_text("must not be copied")
    for name in ("config.json", "modeling_custom.py", "model.safetensors", "training_args.bin", "README.md"):
        (source / name).write_text("must not be copied")
    copy_companions(source, target, {"model_type": "llama"})
    copied = {"tokenizer.json", "tokenizer.model", "merges.txt", "generation_config.json", "chat_template.jinja"}
    assert {file.name for file in target.iterdir()} == copied | {"config.json", "additional_chat_templates"}
    assert [file.name for file in (target / "additional_chat_templates").iterdir()] == ["tools.jinja"]
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama"}
