"""Where pruning computes: the calibration on a GPU where there is one, the cut always on the CPU."""

from pathlib import Path

import pytest
import torch

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.identity import stage_key
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.runtime.activations import measure_activations
from stages.structured_prune import StructuredPrune
from tests.stages.models import make_checkpoint, write_documents
from tests.stages.test_prune_sizes import LLAMA_70B

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

DATA = DatasetSpec(split="calibration", digest="0", nbytes=1_000_000)
CPU, GPU = Target(name="cpu"), Target(name="gpu", gpus=1)
WIDTH = {"intermediate_size": 64, "group_size": 32, "num_samples": 8, "max_length": 32, "importance": "activation"}


@pytest.fixture
def model(tmp_path: Path) -> ModelSpec:
    return DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_is_refused_where_nothing_is_calibrated(model: ModelSpec, device: str) -> None:
    by_magnitude = StructuredPrune.from_dict({"intermediate_size": 64, "group_size": 32}, {"device": device})
    with pytest.raises(ValueError, match=r"^execution\.device: only a calibration computes on it; leave it out, or write importance: act"):
        by_magnitude.infer(model)
    assert StructuredPrune.from_dict(WIDTH, {"device": device}).infer(model, DATA).architecture.intermediate_size == 64
    by_influence = {"num_layers": 2, "num_samples": 8, "max_length": 32}
    assert StructuredPrune.from_dict(by_influence, {"device": device}).infer(model, DATA).architecture.num_layers == 2


def test_the_device_changes_no_key() -> None:
    inputs = {"model": "0" * 64, "calibration": "1" * 64}
    keys = {stage_key(StructuredPrune.from_dict(WIDTH, {"device": device}), inputs) for device in ("auto", "cpu", "cuda")}
    assert len(keys) == 1


def test_the_sweep_is_counted_where_it_computes_and_its_hidden_states_in_ram() -> None:
    """The cut comes after the sweep and needs 1.9 GB of RAM: more than the hidden states of a little text, less than those of much."""
    model, params = ModelSpec.of(LLAMA_70B), {"mlp_ratio": 0.2, "importance": "activation", "max_length": 2048}
    layer = 2 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    for samples, item in ((8, "the matrices of one layer"), (128, "calibration hidden states")):
        stage = StructuredPrune.from_dict(params | {"num_samples": samples})
        on_cpu, on_gpu = (stage.memory(model, target, DATA) for target in (CPU, GPU))
        assert on_gpu.vram["one decoder layer"] == on_cpu.ram["one decoder layer"] == layer and not on_cpu.vram
        assert "one decoder layer" not in on_gpu.ram and "calibration hidden states" not in on_gpu.vram
        assert on_cpu.ram["calibration hidden states"] == samples * 2048 * 8192 * 2
        assert item in on_gpu.ram and on_gpu.disk == on_cpu.disk
        assert (
            StructuredPrune.from_dict(stage.params.model_dump(exclude_defaults=True), {"device": "cpu"}).memory(model, GPU, DATA) == on_cpu
        )


def test_pruning_by_magnitude_uses_no_gpu(model: ModelSpec) -> None:
    stage = StructuredPrune.from_dict({"intermediate_size": 64, "group_size": 32})
    assert not stage.on_gpu(GPU) and StructuredPrune.from_dict(WIDTH).on_gpu(GPU)
    assert stage.memory(model, GPU) == stage.memory(model, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    stage, data = StructuredPrune.from_dict(WIDTH, {"device": "cuda"}), Dataset(write_documents(tmp_path / "text.jsonl"))
    with pytest.raises(ValueError, match="device: 'cuda' is not on this machine"):
        stage.run(Context(tmp_path / "out", lambda event: None), DenseCheckpoint(source), data)


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_measures(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    windows = torch.arange(256).view(4, 64) % 307
    on_cpu, on_gpu = (measure_activations(source, windows, lambda done, total: None, device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(on_gpu.neurons, on_cpu.neurons, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(on_gpu.heads, on_cpu.heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(on_gpu.influence, on_cpu.influence, rtol=1e-4, atol=1e-6)
