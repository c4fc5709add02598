"""`observer: mse`: less error than the whole range gives, in every quantizer that says it has it."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.identity import stage_key
from pipeline.stage import Context, Stage, find_stage
from stages.rtn import RTN
from stages.runtime.clipping import POWER, group_parameters, least_error_parameters
from stages.runtime.packing import pack_weight, unpack_weight
from stages.runtime.scheme import Observer
from tests.stages.models import make_checkpoint, write_documents

NAMES: tuple[Literal["minmax", "mse"], ...] = ("minmax", "mse")
CALIBRATED = {"num_samples": 4, "max_length": 32}
PARAMS: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": CALIBRATED, "awq": CALIBRATED | {"n_grid": 3, "symmetric": True}}
DATA = DatasetSpec(split="calibration", digest="0", nbytes=100_000)
Q = "model.layers.0.self_attn.q_proj"


def make(name: str, source: Path, output: Path, **params: object) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors that stage `name` writes, and the weights' arguments in its config.json."""
    stage: Stage = find_stage(name).from_dict({"num_bits": 3, "group_size": 32, **PARAMS[name], **params})
    inputs = {} if name == "rtn" else {"calibration": Dataset(write_documents(output.parent / "calibration.jsonl"))}
    made = stage.run(Context(output, lambda event: None), model=DenseCheckpoint(source), **inputs)
    config = json.loads((made.path / "config.json").read_text())
    return load_file(made.path / "model.safetensors"), config["quantization_config"]["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_group_has_more_error_and_most_have_less(num_bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    form = RTN.from_dict({"num_bits": num_bits, "group_size": 128, "symmetric": symmetric}).params.format
    errors = {}
    for observer in NAMES:
        rounded = unpack_weight(pack_weight(weight, form, *group_parameters(weight, form, Observer(observer))), form, torch.float32)
        errors[observer] = (rounded - weight).view(64, 2, 128).abs().pow(POWER).sum(-1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert (errors["mse"] < 0.95 * errors["minmax"]).float().mean() > 0.5


def test_an_outlier_is_clipped_so_that_all_others_are_finer() -> None:
    weight = torch.linspace(-1, 1, 128).repeat(4, 1)
    weight[0, 5] = 1.2
    form = RTN.from_dict({"num_bits": 3}).params.format
    scales, whole = (group_parameters(weight, form, Observer(name))[0][:, 0] for name in ("mse", "minmax"))
    assert scales[0] < 0.9 * whole[0]
    assert torch.equal(scales[1], scales[2])


@pytest.mark.parametrize("name", PARAMS)
def test_every_quantizer_rounds_with_it_and_says_so_in_its_config(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1, dtype=torch.float32)
    found = {observer: make(name, source, tmp_path / observer, observer=observer) for observer in ("minmax", "mse")}
    assert [found[observer][1]["observer"] for observer in found] == ["memoryless_minmax", "memoryless_mse"]
    whole, least = (found[observer][0][f"{Q}.weight_scale"] for observer in found)
    assert (least <= whole * 1.0001).all()
    assert (least < 0.99 * whole).float().mean() > 0.5
    if name != "awq":  # which scales the weights first
        form = RTN.from_dict({"num_bits": 3, "group_size": 32}).params.format
        expected, _ = least_error_parameters(load_file(source / "model.safetensors")[f"{Q}.weight"], form, Observer("mse").steps)
        assert torch.equal(least, expected)


def test_a_range_may_shrink_further_and_then_the_library_is_told_so(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1, dtype=torch.float32)
    near, far = (make("rtn", source, tmp_path / str(share), num_bits=2, observer="mse", maxshrink=share) for share in (0.2, 0.6))
    assert near[1]["observer_kwargs"] == {} and far[1]["observer_kwargs"] == {"maxshrink": 0.6}
    ratio = far[0][f"{Q}.weight_scale"] / near[0][f"{Q}.weight_scale"]
    assert ratio.max() <= 1 and ratio.min() < 0.95
    with pytest.raises(ValueError, match="maxshrink: observer minmax shrinks no range; leave it out or write observer: mse"):
        RTN.from_dict({"maxshrink": 0.5})


def test_the_default_adds_nothing_to_keys() -> None:
    keys = [stage_key(RTN.from_dict(params), {"model": "m"}) for params in ({}, {"observer": "minmax"}, {"observer": "mse"})]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(("name", "backend"), [("awq", "autoawq"), ("gptq", "gptqmodel")])
def test_a_backend_without_it_refuses_it(tmp_path: Path, name: str, backend: str) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    stage = find_stage(name).from_dict({"group_size": 32, "backend": backend, "observer": "mse", **CALIBRATED})
    with pytest.raises(ValueError, match=f"observer: {backend} cannot be told; leave it at minmax, or write backend: llmcompressor"):
        stage.infer(spec, DATA)


def test_the_search_is_planned_as_the_slow_part_of_rounding(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    plain, searched = (RTN.from_dict({"group_size": 32, "observer": observer}).work(spec) for observer in ("minmax", "mse"))
    assert searched.cpu_shared > 5 * plain.cpu_shared
    gptq = [find_stage("gptq").from_dict({"group_size": 32, "observer": o, **CALIBRATED}).work(spec, DATA) for o in ("minmax", "mse")]
    assert gptq[0].nbytes < gptq[1].nbytes
