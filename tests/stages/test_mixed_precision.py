"""Each layer at its own bits: within the budget, as measured, planned to the byte, and read by stock transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.architecture import Architecture
from pipeline.artifact import SENSITIVITY_FILE, Dataset, DenseCheckpoint, QuantizedCheckpoint, Sensitivity
from pipeline.artifact_spec import DatasetSpec, SensitivitySpec
from pipeline.fused_products import product_of
from pipeline.headers import tensor_table
from pipeline.layout import WeightFormat
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from pipeline.target import Target
from stages.dequantize import Dequantize
from stages.gptq import GPTQ
from stages.rtn import RTN
from stages.runtime.guard import check_checkpoint
from stages.runtime.mixed_bits import mean_bits, num_weights, unit_sizes, units_of
from stages.runtime.packing import packed_formats
from stages.runtime.scheme import pack_layers
from stages.runtime.sensitivity import rounded
from stages.runtime.text import calibration_windows, load_tokenizer
from tests.stages.models import make_checkpoint, write_documents

CHOICES = (3, 4, 8)
LLAMA_70B = Architecture(
    model_type="llama", dtype="BF16", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
    num_kv_heads=8, head_dim=128, max_position=131072,
)  # fmt: skip


def measured(spec: ModelSpec, fused: bool = True, group_size: int = 32, seed: int = 0, **changes: Any) -> SensitivitySpec:
    """Divergences that fall fourfold with each bit, from a level that is drawn for each unit."""
    draw, units = random.Random(seed), units_of(pack_layers(spec, WeightFormat(num_bits=4, group_size=group_size), ("lm_head",)), fused)
    levels = {unit: draw.lognormvariate(0, 1.5) for unit in units}
    divergence = tuple(tuple(level * 4.0**-bits for bits in CHOICES) for level in levels.values())
    content = {
        "choices": CHOICES,
        "group_size": group_size,
        "symmetric": True,
        "fused": fused,
        "units": tuple(units),
        "divergence": divergence,
    }
    return SensitivitySpec(**content | changes)


def params(budget_bits: float, choices: tuple[int, ...] = CHOICES, **more: Any) -> dict[str, Any]:
    return {"group_size": 32, "mixed_precision": {"budget_bits": budget_bits, "choices": choices}, **more}


def artifact(folder: Path, spec: SensitivitySpec) -> Sensitivity:
    folder.mkdir()
    (folder / SENSITIVITY_FILE).write_text(spec.model_dump_json())
    return Sensitivity(folder, spec)


def hold(made: QuantizedCheckpoint, inferred: ModelSpec) -> None:
    """Bytes, config.json and values are what was planned, and config.json alone says it too."""
    assert {name: (entry.dtype, entry.shape) for name, entry in tensor_table(made.path).items()} == inferred.tensors()
    assert sum(entry.nbytes for entry in tensor_table(made.path).values()) == inferred.nbytes
    check_checkpoint(made.path, inferred)
    assert ModelSpec.from_config(made.config) == inferred == made.spec
    _, info = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(info.values()), info


def bits_of(spec: ModelSpec) -> dict[str, int | None]:
    return {name: form.num_bits for name, form in packed_formats(spec).items()}


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": True}, {"attention_bias": True, "shard_size": "40KB"}, {"model_type": "qwen3", "head_dim": 32}],
    ids=str,
)
@pytest.mark.parametrize("fused", [True, False])
def test_stock_transformers_computes_with_each_layer_rounded_to_its_own_bits(tmp_path: Path, config: dict[str, Any], fused: bool) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", **config))
    spec = source.model_spec
    found, stage = measured(spec, fused), RTN.from_dict(params(5.0))
    inferred = stage.infer(spec, found)
    made = stage.run(Context(tmp_path / "out", lambda event: None), source, artifact(tmp_path / "sensitivity", found))
    hold(made, inferred)
    assert len(set(bits_of(inferred).values())) == 3
    dense = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
    with torch.no_grad():
        for module, form in packed_formats(inferred).items():
            weight = dense.get_parameter(f"{module}.weight")
            weight.copy_(rounded(weight, form, weight.dtype))
        ids = torch.arange(40).view(2, 20)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")(ids).logits, dense(ids).logits)
    (tmp_path / "dense").mkdir()
    back = Dequantize.from_dict({}).run(Context(tmp_path / "dense", lambda event: None), made)
    check_checkpoint(back.path, spec)


def test_gptq_gives_each_layer_the_same_bits_and_is_closer(tmp_path: Path) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source", num_hidden_layers=2))
    spec, path = source.model_spec, write_documents(tmp_path / "calibration.jsonl")
    data, found = Dataset(path, DatasetSpec(split="calibration", digest="0", nbytes=path.stat().st_size)), measured(source.model_spec)
    stage = GPTQ.from_dict(params(3.9, num_samples=32, max_length=64))
    inferred, sensitivity = stage.infer(spec, data.spec, found), artifact(tmp_path / "sensitivity", found)
    made = stage.run(Context(tmp_path / "gptq", lambda event: None), source, data, sensitivity)
    hold(made, inferred)
    rtn = RTN.from_dict(params(3.9))
    assert rtn.infer(spec, found) == inferred
    plain = rtn.run(Context(tmp_path / "rtn", lambda event: None), source, sensitivity)
    ids = calibration_windows(data, load_tokenizer(source.path), 8, 64)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32)(ids).logits for at in (source.path, made.path, plain.path)]
    assert (logits[1] - logits[0]).norm() < 0.95 * (logits[2] - logits[0]).norm()


def test_the_assignment_stands_beside_the_model(tmp_path: Path) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source"))
    found, stage = measured(source.model_spec), RTN.from_dict(params(4.6))
    made = stage.run(Context(tmp_path / "out", lambda event: None), source, artifact(tmp_path / "sensitivity", found))
    told = json.loads((made.path / "mixed_precision.json").read_text())
    bits = {module: told["bits"][unit] for unit, modules in told["modules"].items() for module in modules}
    assert bits == bits_of(made.model_spec) and 4.4 < told["bits_per_weight"] <= told["budget_bits"] == 4.6
    assert found.divergence is not None
    chosen = [row[CHOICES.index(told["bits"][unit])] for unit, row in zip(found.units, found.divergence, strict=True)]
    assert told["divergence"] == pytest.approx(sum(chosen)) and told["divergence"] < told["uniform_divergence"]["4"]
    plain = RTN.from_dict({"group_size": 32}).run(Context(tmp_path / "plain", lambda event: None), source)
    assert not (plain.path / "mixed_precision.json").exists() and plain.config["quantization_config"]["config_groups"].keys() == {"group_0"}


def test_what_engines_compute_in_one_product_has_equal_bits() -> None:
    spec, parts = ModelSpec.of(LLAMA_70B), {}
    for name, bits in bits_of(RTN.from_dict(params(4.1) | {"group_size": 128}).infer(spec, measured(spec, group_size=128))).items():
        parts.setdefault(product_of(name), set()).add(bits)
    assert len(parts) == 4 * 80 and all(len(bits) == 1 for bits in parts.values())
    assert len(set().union(*parts.values())) == 3


def test_no_layer_is_favoured_for_its_place() -> None:
    """The same layers with their measurements the other way round get the same bits the other way round."""
    spec = ModelSpec.of(LLAMA_70B)
    found = measured(spec, group_size=128)
    assert found.divergence is not None
    by_layer = [found.divergence[first : first + 4] for first in range(0, 320, 4)]
    reversed_layers = found.model_copy(update={"divergence": tuple(row for rows in reversed(by_layer) for row in rows)})
    stage = RTN.from_dict(params(4.1) | {"group_size": 128})
    one, other = (bits_of(stage.infer(spec, each)) for each in (found, reversed_layers))
    turned = {
        name.replace(f"layers.{layer}.", f"layers.{79 - layer}."): one[name] for name in one if (layer := int(name.split(".")[2])) >= 0
    }
    assert turned == other and one != other


def test_before_the_measurement_a_plan_has_the_most_that_any_measurement_can_lead_to() -> None:
    spec, target = ModelSpec.of(LLAMA_70B), Target(name="any")
    unknown = measured(spec, group_size=128, divergence=None)
    for budget in (3.3, 4.125, 6.0):
        stage = RTN.from_dict(params(budget) | {"group_size": 128})
        most = stage.infer(spec, unknown)
        weights, left_dense = num_weights(most), sum(group.num_parameters for group in most.groups if group.format.is_dense)
        packed = most.nbytes - 2 * left_dense - 16 * len(bits_of(most))  # without the 16 bytes of each weight's shape
        assert 0.9999 * budget < 8 * packed / weights <= budget
        for seed in range(3):
            exact = stage.infer(spec, measured(spec, group_size=128, seed=seed))
            assert 0.99 * most.nbytes < exact.nbytes <= most.nbytes
        assert "sizes are the most that the budget allows" in stage.explain(spec, unknown)[-1]
        assert stage.memory(spec, target, unknown).totals["disk"] == most.nbytes


def test_the_budget_counts_scales_and_zero_points_as_they_stand_on_disk() -> None:
    packed = pack_layers(ModelSpec.of(LLAMA_70B), WeightFormat(num_bits=4, group_size=128), ("lm_head",))
    for form, bits in (
        (WeightFormat(num_bits=4, group_size=128), 4.125),
        (WeightFormat(num_bits=3, group_size=32, symmetric=False), 3.59375),
    ):
        assert mean_bits((row[0] for row in unit_sizes(packed, True, (form,))), packed) == bits


def test_the_plan_tells_what_is_chosen_and_what_it_costs() -> None:
    spec = ModelSpec.of(LLAMA_70B)
    found, stage = measured(spec, group_size=128), RTN.from_dict(params(4.1) | {"group_size": 128})
    served, chosen, cost = stage.explain(spec, found)
    assert served.startswith("choices 3: vLLM's usual kernels take 4 and 8 bits")
    assert chosen.startswith("4.100 of 4.1 bits per weight: qkv_proj 3 in layers ") and "; o_proj " in chosen and "; down_proj " in chosen
    assert "with 4 bits everywhere" in cost
    assert RTN.from_dict({}).explain(spec) == []


@pytest.mark.parametrize(
    ("changes", "spec_changes", "sentence"),
    [
        ({"budget_bits": 3.4}, {}, r"mixed_precision\.budget_bits: 3\.4 is less than the 3\.5 that 3 bits take everywhere, scales counted"),
        (
            {"budget_bits": 3.5},
            {},
            r"3\.5 is no more than the 3\.5 that 3 bits take everywhere.*; write more than 3\.5, or allow fewer bits",
        ),
        ({"budget_bits": 8.5}, {}, r"budget_bits: 8\.5 is enough for 8 bits everywhere, which take 8\.5; write less, or num_bits: 8"),
        ({"choices": [2, 4, 5]}, {}, r"mixed_precision\.choices: 2, 5 bits are not among those that were measured, 3, 4, 8"),
        ({}, {"group_size": 16}, "group_size: 32 here, but the sensitivity was measured with 16; write the same in both"),
        ({}, {"symmetric": False}, "symmetric: true here, but the sensitivity was measured with false"),
        (
            {},
            {"units": ("model.layers.0.self_attn.qkv_proj",)},
            r"the sensitivity is that of other layers \(model\.layers\.0\..* and 10 more\)",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_refused_in_the_plan(
    tmp_path: Path, changes: dict[str, Any], spec_changes: dict[str, Any], sentence: str
) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    content = {"budget_bits": 4.5, "choices": CHOICES} | changes
    stage = RTN.from_dict({"group_size": 32, "mixed_precision": content})
    for divergence in ({}, {"divergence": None}):
        with pytest.raises(ValueError, match=sentence):
            stage.infer(spec, measured(spec, **spec_changes | divergence))


def test_it_is_refused_without_a_measurement_and_beside_num_bits(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    with pytest.raises(
        ValueError, match=r"mixed_precision: it needs to know what rounding each layer costs; put a stage `sensitivity` before"
    ):
        RTN.from_dict(params(4.5)).infer(spec)
    with pytest.raises(ValidationError, match="num_bits 8 has no effect beside mixed_precision"):
        RTN.from_dict(params(4.5, num_bits=8))
    with pytest.raises(ValidationError, match="one width is nothing to choose from; write two or more, or num_bits instead"):
        RTN.from_dict(params(4.5, choices=(4,)))
    with pytest.raises(ValueError, match="group_size: 64 does not divide the columns of"):
        RTN.from_dict(params(4.5) | {"group_size": 64}).infer(spec, measured(spec))
    with pytest.raises(ValueError, match="mixed_precision: gptqmodel cannot be told"):
        GPTQ.from_dict(params(4.5, backend="gptqmodel")).infer(
            spec, DatasetSpec(split="calibration", digest="0", nbytes=10**6), measured(spec)
        )
    assert "sensitivity" in RTN.from_dict({}).unused() and "sensitivity" not in RTN.from_dict(params(4.5)).inputs().keys() ^ {
        "model",
        "sensitivity",
    }


def test_a_checkpoint_whose_schemes_name_no_layer_or_divide_none_is_refused(tmp_path: Path) -> None:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source"))
    found = measured(source.model_spec)
    made = RTN.from_dict(params(5.0)).run(Context(tmp_path / "out", lambda e: None), source, artifact(tmp_path / "sensitivity", found))
    quantization = made.config["quantization_config"]
    groups = quantization["config_groups"]
    patterns = groups | {"group_0": groups["group_0"] | {"targets": ["re:.*proj"]}}
    with_pattern = ModelSpec.from_config(made.config | {"quantization_config": quantization | {"config_groups": patterns}})
    assert set(bits_of(with_pattern).values()) == {groups["group_0"]["weights"]["num_bits"]}  # the first that matches
    everything = groups | {"group_0": groups["group_0"] | {"targets": ["Linear"]}}
    with pytest.raises(ValueError, match="mixes quantization schemes"):
        ModelSpec.from_config(made.config | {"quantization_config": quantization | {"config_groups": everything}})
    groups["group_1"]["weights"]["group_size"] = 64
    with pytest.raises(ValueError, match=r"group_size: 64 does not divide the columns of model\.layers\.\*\.mlp\.down_proj \(96\)"):
        names = groups["group_1"]["targets"] + ["re:.*down_proj"]
        changed = {"group_1": groups["group_1"] | {"targets": names}, "group_0": groups["group_0"]}
        ModelSpec.from_config(made.config | {"quantization_config": quantization | {"config_groups": changed}})
