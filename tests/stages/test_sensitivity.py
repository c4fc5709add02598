"""What rounding one unit costs: as measured by rounding it and running the whole model, however variants are grouped or interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.artifact import Dataset, DenseCheckpoint, Sensitivity
from pipeline.artifact_spec import DatasetSpec
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.runtime.loading import load_model
from stages.runtime.mixed_bits import units_of
from stages.runtime.packing import min_max_parameters, pack_weight, unpack_weight
from stages.runtime.scheme import pack_layers
from stages.runtime.sensitivity import Variant, groups_of, rounded
from stages.runtime.text import calibration_windows, load_tokenizer
from stages.sensitivity import MeasureSensitivity
from tests.pipeline.test_model_config import MIXTRAL
from tests.stages.models import make_checkpoint, write_documents

PARAMS: dict[str, Any] = {"choices": [2, 4], "group_size": 32, "num_samples": 4, "max_length": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    """In float32, so that no order of summation matters."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sensitivity"), dtype=torch.float32, num_hidden_layers=2)
    return DenseCheckpoint(folder, ModelSpec.from_config(json.loads((folder / "config.json").read_text())))


def text(folder: Path) -> Dataset:
    path = write_documents(folder / "calibration.jsonl")
    return Dataset(path, DatasetSpec(split="calibration", digest="d1", nbytes=path.stat().st_size))


def measure(
    folder: Path, source: DenseCheckpoint, events: Any = None, execution: dict[str, Any] | None = None, **params: Any
) -> Sensitivity:
    stage = MeasureSensitivity.from_dict(PARAMS | params, execution or {})
    folder.mkdir(exist_ok=True)
    made = stage.run(Context(folder, events or (lambda event: None)), source, text(folder.parent))
    assert made.measured == made.spec
    assert made.measured.model_copy(update={"divergence": None}) == stage.infer(source.model_spec, text(folder.parent).spec)
    return made


@torch.no_grad()
def by_hand(source: DenseCheckpoint, modules: tuple[str, ...], form: WeightFormat, windows: torch.Tensor) -> float:
    """The definition: the whole model, and the whole model with these weights packed and unpacked."""
    model = load_model(source.path)
    log_p = model(windows).logits.double().log_softmax(-1)
    for module in modules:
        weight = model.get_parameter(f"{module}.weight")
        weight.copy_(unpack_weight(pack_weight(weight, form, *min_max_parameters(weight, form)), form, weight.dtype))
    log_q = model(windows).logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("fused", [True, False])
def test_each_number_is_what_rounding_that_unit_alone_costs(tmp_path: Path, source: DenseCheckpoint, fused: bool) -> None:
    made = measure(tmp_path / "out", source, fused=fused, ignore=[], symmetric=False)
    spec, measured = source.model_spec, made.measured
    windows = calibration_windows(text(tmp_path), load_tokenizer(source.path), 4, 32)
    units = units_of(pack_layers(spec, WeightFormat(num_bits=4, group_size=32), ()), fused)
    assert measured.units == tuple(units) and len(units) == (2 * 4 if fused else 2 * 7) + 1  # and the head
    assert measured.divergence is not None
    for (unit, modules), row in list(zip(units.items(), measured.divergence, strict=True))[:: 2 if fused else 3]:
        for bits, divergence in zip((2, 4), row, strict=True):
            form = WeightFormat(num_bits=bits, group_size=32, symmetric=False)
            assert divergence == pytest.approx(by_hand(source, modules, form, windows), rel=2e-3, abs=1e-6), (unit, bits)
    assert made.metrics["divergence_2_bits"] == pytest.approx(sum(row[0] for row in measured.divergence))
    assert made.metrics["divergence_2_bits"] > 3 * made.metrics["divergence_4_bits"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
def test_weights_are_rounded_as_they_would_be_stored(num_bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, form = torch.randn(48, 96).bfloat16(), WeightFormat(num_bits=num_bits, group_size=32, symmetric=symmetric)
    packed = pack_weight(weight, form, *min_max_parameters(weight, form))
    assert torch.equal(rounded(weight, form, torch.bfloat16), unpack_weight(packed, form, torch.bfloat16))
    assert {suffix: tuple(tensor.shape) for suffix, tensor in packed.items()} == {
        suffix: shape for suffix, (_, shape) in form.tensors((48, 96), "BF16").items()
    }


def test_how_variants_are_grouped_changes_nothing(tmp_path: Path, source: DenseCheckpoint) -> None:
    at_once, one_unit = measure(tmp_path / "a", source), measure(tmp_path / "b", source, execution={"hidden_states": 1})
    assert at_once.measured == one_unit.measured
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["sensitivity.json"]
    variants = [Variant(unit, WeightFormat(num_bits=bits)) for unit in "abcde" for bits in (3, 4)]
    assert [len(group) for group in groups_of(variants, 5)] == [4, 4, 2] and [len(g) for g in groups_of(variants, 1)] == [2] * 5


class Stop(Exception):
    pass


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path: Path, source: DenseCheckpoint) -> None:
    whole = measure(tmp_path / "whole", source)
    computed: list[int] = []

    def interrupted(event: dict[str, Any]) -> None:
        computed.append(event.get("done", 0))
        if event["event"] == "progress" and event["done"] > 0.6 * event["total"]:
            raise Stop

    with pytest.raises(Stop):
        measure(tmp_path / "cut", source, interrupted, {"hidden_states": 1})
    events: list[dict[str, Any]] = []
    assert measure(tmp_path / "cut", source, events.append, {"hidden_states": 1}).measured == whole.measured
    (resumed,) = (event["text"] for event in events if event["event"] == "resumed")
    count = int(resumed.split()[0])
    assert resumed == f"{count} of 8 units were measured" and 3 <= count <= 7
    last = [event for event in events if event["event"] == "progress"][-1]
    assert last["done"] == last["total"] < max(computed)


def test_weights_that_overflow_are_refused(tmp_path: Path, source: DenseCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.runtime.sensitivity.rounded", lambda weight, form, stored: weight * float("inf"))
    with pytest.raises(ValueError, match=r"rounding model\.layers\.0\.self_attn\.qkv_proj to 2 bits makes the model compute nan or inf"):
        measure(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"choices": [4]}, "one width is nothing to choose from"),
        ({"choices": [4, 4, 8]}, "a width stands in it twice"),
        ({"choices": [4, 9]}, "Input should be 2, 3, 4, 5, 6, 7 or 8"),
    ],
    ids=str,
)
def test_widths_that_cannot_be_are_refused(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        MeasureSensitivity.from_dict(PARAMS | params)


def test_what_cannot_be_measured_is_refused_before_any_weight_is_read(tmp_path: Path, source: DenseCheckpoint) -> None:
    spec, data = source.model_spec, text(tmp_path).spec
    with pytest.raises(ValueError, match=r"group_size: 64 does not divide the columns of .*down_proj \(96\); 32 divides"):
        MeasureSensitivity.from_dict(PARAMS | {"group_size": 64}).infer(spec, data)
    with pytest.raises(ValueError, match="max_length: 512 is more than the model's 256 positions"):
        MeasureSensitivity.from_dict(PARAMS | {"max_length": 512}).infer(spec, data)
    with pytest.raises(ValueError, match="num_samples: 4000 windows of 32 tokens need more text"):
        MeasureSensitivity.from_dict(PARAMS | {"num_samples": 4000}).infer(spec, data)
    with pytest.raises(ValueError, match="sensitivity is not measured of a mixture of experts yet, and mixtral is one"):
        MeasureSensitivity.from_dict(PARAMS).infer(ModelSpec.from_config(MIXTRAL), data)


@pytest.mark.usefixtures("bf16_units")
def test_the_plan_counts_a_variant_from_its_own_layer_on(tmp_path: Path, source: DenseCheckpoint) -> None:
    data, target, stage = text(tmp_path).spec, Target(name="any"), MeasureSensitivity.from_dict
    spec, head = source.model_spec, {"ignore": ["lm_head", "re:.*layers.0.*"]}
    first, last = (stage(PARAMS | {"ignore": ["lm_head", f"re:.*layers.{n}.*"]}).work(spec, data).flops for n in (1, 0))
    assert last < first < 2 * last  # the head is computed of all of them
    assert stage(PARAMS).work(spec, data).flops < first + last
    assert stage(PARAMS, {"hidden_states": 1}).work(spec, data).disk > 3 * stage(PARAMS | head).work(spec, data).disk
    small, large = (stage(PARAMS, {"hidden_states": size}).memory(spec, data, target).totals["ram"] for size in (1, 1 << 30))
    assert small < large
