"""`offload: disk` changes where a model waits while it is calibrated, and nothing of what is made of it."""

import gc
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.offload import OffloadCache, disable_onloading

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import read_header
from pipeline.stage import Context, find_stage
from pipeline.target import Target
from stages.runtime import guard, packing
from stages.runtime.loading import load_model
from stages.runtime.offloading import check_loads, layers_keep_weights, model_in_ram, model_on_disk
from stages.runtime.scoring import token_losses
from stages.runtime.tensors import TensorReader
from tests.stages.models import make_checkpoint, save_tensors, write_documents

SMALL = {"num_bits": 4, "group_size": 32, "num_samples": 8, "max_length": 64}
DATA = DatasetSpec(split="calibration", digest="0", nbytes=1000)


def quantize(name: str, source: Path, output: Path, offload: str, emit: Any = lambda event: None, **params: object) -> dict[str, bytes]:
    """File name -> content of what the stage made."""
    search = {"n_grid": 4} if name == "awq" else {}
    stage = find_stage(name).from_dict(SMALL | search | params, {"batch_size": 4, "offload": offload})
    data = Dataset(write_documents(output.parent / "calibration.jsonl"))
    made = stage.run(Context(output, emit), DenseCheckpoint(source), data)
    return {str(file.relative_to(made.path)): file.read_bytes() for file in made.path.rglob("*") if file.is_file()}


def drop(source: Path, name: str) -> None:
    """Rewrite a one-file checkpoint without the tensor `name`."""
    reader = TensorReader(source)
    save_tensors(source, {kept: reader.read(kept) for kept in reader.table if kept != name})


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("config", "params"),
    [
        ({"tie_word_embeddings": True}, {"ignore": [], "symmetric": False}),
        ({"attention_bias": True, "shard_size": "40KB"}, {"num_bits": 8, "ignore": ["lm_head", "re:.*layers.0.mlp.*"]}),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "dtype": torch.float32}, {}),
    ],
    ids=["tied", "sharded", "fp32"],
)
def test_the_checkpoint_is_the_same_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict[str, Any], params: dict[str, Any]
) -> None:
    monkeypatch.setattr(guard, "PROBE_TOLERANCE", 1e-6)  # only sums over the vocabulary are taken in another order
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, **config)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    in_ram, on_disk = (quantize(name, source, tmp_path / place, place, **params) for place in ("ram", "disk"))
    assert in_ram == on_disk
    assert [entry.name for entry in (tmp_path / "disk").iterdir() if entry.is_dir()] == []
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before  # the folder's links were never written through


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_plan_knows_what_the_offload_folder_will_hold(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    held: list[int] = []

    def look(event: dict[str, Any]) -> None:
        if event.get("label") == "writing" and not held:
            (folder,) = (tmp_path / "out").glob("offload-*")
            written = [file for file in folder.iterdir() if not file.is_symlink()]
            held.append(sum(entry.nbytes for file in written for entry in read_header(file).values() if len(entry.shape) == 2))

    quantize(name, source, tmp_path / "out", "disk", look)
    stage, spec = find_stage(name).from_dict(SMALL, {"offload": "disk"}), DenseCheckpoint(source).model_spec
    need = stage.memory(model=spec, calibration=DATA, target=Target(name="cpu"))
    assert held == [need.disk["changed weights"]]
    assert need.disk["checkpoint"] == stage.infer(model=spec, calibration=DATA).nbytes


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_plan_counts_a_layer_and_not_the_model(tmp_path: Path, name: str) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=3, intermediate_size=192)).model_spec
    layer = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)
    for target in (Target(name="cpu"), Target(name="gpu", gpus=1)):
        in_ram, on_disk = (
            find_stage(name).from_dict(SMALL, {"offload": place}).memory(model=spec, calibration=DATA, target=target)
            for place in ("ram", "disk")
        )
        assert "model" not in on_disk.ram
        assert on_disk.ram["one layer, or the embedding"] == layer > 2 * 307 * 64
        assert on_disk.totals["ram"] == in_ram.totals["ram"] - spec.nbytes + layer
        assert on_disk.vram == in_ram.vram


def test_weights_are_in_memory_one_layer_at_a_time(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=3)
    ids, held = torch.arange(24)[None], []
    with model_on_disk(source, tmp_path / "out", torch.bfloat16) as model:
        with disable_onloading():
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        for layer in model.get_decoder().layers:
            layer.register_forward_hook(lambda *_: held.append(sum(kept.nbytes for kept in OffloadCache.keep_onloaded_values.values())))
        with layers_keep_weights(model):
            losses = token_losses(model, ids)
    assert torch.equal(losses, token_losses(load_model(source), ids))
    assert held == [2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64)] * 3  # a layer's Linear weights and norms
    assert not OffloadCache.keep_onloaded_values and not OffloadCache.offloading_disabled
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_weights_in_ram_are_no_views_of_the_checkpoints_file(tmp_path: Path) -> None:
    """Changed pages of a mapped file stay in memory for as long as any other tensor of that file."""
    source = make_checkpoint(tmp_path / "source")
    file = str(source / "model.safetensors")
    mapped = load_model(source)
    assert file in Path("/proc/self/maps").read_text()
    del mapped
    gc.collect()
    with model_in_ram(source, torch.bfloat16) as model:
        assert file not in Path("/proc/self/maps").read_text()
        assert torch.equal(model.lm_head.weight, TensorReader(source).read("lm_head.weight"))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private maps on Linux only")
def test_a_memory_limit_below_the_model_is_kept(tmp_path: Path) -> None:
    """A private writable map counts in full, and safetensors opens no other kind."""
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=6, hidden_size=512, intermediate_size=4096)
    expected, ids = token_losses(load_model(source), torch.arange(9)[None]), torch.arange(9)[None]
    gc.collect()
    used = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + DenseCheckpoint(source).model_spec.nbytes // 2, before[1]))
    try:
        with model_on_disk(source, tmp_path / "out", torch.bfloat16) as model, layers_keep_weights(model):
            losses = token_losses(model, ids)
        with pytest.raises(RuntimeError, match="unable to mmap"):
            load_model(source)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("offload", ["ram", "disk"])
def test_a_model_with_a_missing_weight_is_refused(tmp_path: Path, offload: str) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    drop(source, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"does not load as the model .*missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize("gptq", source, tmp_path / "out", offload)
    assert not list((tmp_path / "out").glob("*"))


def test_a_saved_checkpoint_that_is_not_the_calibrated_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ leaves weights unrounded in memory, so that a forward that does not round them is seen too."""
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    pack = packing.pack_weight
    monkeypatch.setattr(packing, "pack_weight", lambda weight, form, scale, zero: pack(weight, form, scale * 1.5, zero))
    with pytest.raises(ValueError, match="does not reload as the model that was made"):
        quantize("awq", source, tmp_path / "out", "disk", num_bits=2)


def test_a_saved_checkpoint_that_transformers_would_fill_in_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    quantize("gptq", source, tmp_path / "out", "disk")
    check_loads(tmp_path / "out")
    drop(tmp_path / "out", "model.layers.1.mlp.up_proj.weight_scale")
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        check_loads(tmp_path / "out")
