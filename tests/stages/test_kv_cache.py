"""The stage kv_cache: a sidecar and nothing else changes, for dense and packed models, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.companions import CACHE_FILE, SCALES_FILE
from pipeline.identity import stage_key
from pipeline.kv_sidecar import read_cache
from pipeline.stage import Context, find_stage
from pipeline.target import Target
from stages.kv_cache import KVCache
from stages.runtime.guard import check_checkpoint
from stages.runtime.int8_cache import load_cache
from tests.stages.models import make_checkpoint, write_documents

STATIC = {"mode": "static", "num_samples": 4, "max_length": 64}
DATA = DatasetSpec(split="calibration", digest="0", nbytes=10_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(write_documents(tmp_path_factory.mktemp("data") / "calibration.jsonl"), DATA)


def run(stage: str, folder: Path, model: Checkpoint, params: dict[str, Any], **inputs: Artifact | None) -> Any:
    return find_stage(stage).from_dict(params).run(Context(folder, lambda event: None), model, **inputs)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_sidecar_is_all_that_is_added(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    before = contents(source.path)
    for params, added in (({}, {CACHE_FILE}), (STATIC, {CACHE_FILE, SCALES_FILE})):
        folder = tmp_path / str(len(added))
        made = run("kv_cache", folder, source, params, calibration=text if params else None)
        after = contents(folder)
        assert type(made) is DenseCheckpoint and after.keys() - before.keys() == added
        assert {name: after[name] for name in before} == before == contents(source.path)
        check_checkpoint(folder, made.spec)
        assert made.spec == source.model_spec.with_cache("static" if params else "per_token_head")
    assert json.loads(after[CACHE_FILE]) == {"format_version": 1, "num_bits": 8, "mode": "static"}
    assert "kv_cache_scheme" not in after["config.json"].decode()


def test_plain_transformers_loads_the_folder_with_a_16_bit_cache(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    made = run("kv_cache", tmp_path / "made", source, STATIC, calibration=text)
    ids = AutoTokenizer.from_pretrained(made.path)("A stage reads shapes and bytes.", return_tensors="pt")["input_ids"]
    outputs = []
    for folder in (source.path, made.path):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            outputs.append(model(ids, use_cache=True))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[1].past_key_values.layers[0].keys.dtype == torch.bfloat16
    with torch.no_grad():
        int8 = model(ids, past_key_values=load_cache(made.path, model.config), use_cache=True).logits
    assert not torch.equal(int8, outputs[0].logits)


def test_a_packed_model_stays_packed(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    packed = run("rtn", tmp_path / "packed", source, {"group_size": 32})
    made = run("kv_cache", tmp_path / "made", packed, STATIC, calibration=text)
    assert type(made) is QuantizedCheckpoint and made.spec == packed.spec.with_cache("static")
    check_checkpoint(made.path, made.spec)


def test_the_other_mode_takes_the_place_of_the_first(source: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    """And what was published is not touched, although its files are shared."""
    static = run("kv_cache", tmp_path / "static", source, STATIC, calibration=text)
    for file in static.path.iterdir():
        file.chmod(0o444)
    before = contents(static.path)
    made = run("kv_cache", tmp_path / "made", static, {})
    assert contents(static.path) == before
    assert (made.path / "model.safetensors").stat().st_ino == (static.path / "model.safetensors").stat().st_ino
    assert not (made.path / SCALES_FILE).exists() and made.spec.kv_cache.mode == "per_token_head"
    settings = read_cache(made.path)
    assert settings is not None and settings.mode == "per_token_head"
    check_checkpoint(made.path, made.spec)
    again = run("kv_cache", tmp_path / "again", made, STATIC, calibration=text)
    assert contents(again.path) == before


def test_later_stages_take_the_cache_along(source: DenseCheckpoint, tmp_path: Path) -> None:
    cached = run("kv_cache", tmp_path / "cached", source, {})
    packed = run("rtn", tmp_path / "packed", cached, {"group_size": 32})
    pruned = run("structured_prune", tmp_path / "pruned", cached, {"num_kv_heads": 1, "group_size": 1})
    for made in (packed, pruned):
        check_checkpoint(made.path, made.spec)
        assert made.spec.kv_cache.mode == "per_token_head"


def test_bytes_per_token_are_told_by_the_plan(source: DenseCheckpoint) -> None:
    spec = source.model_spec  # 3 layers, 2 KV heads of 16
    assert spec.kv_cache.bytes_per_token == 2 * 3 * 2 * 32
    assert KVCache().infer(spec).kv_cache.bytes_per_token == 2 * 3 * 2 * (16 + 4)
    assert KVCache.from_dict(STATIC).infer(spec, DATA).kv_cache.bytes_per_token == 2 * 3 * 2 * 16
    told, served = KVCache().explain(spec)
    assert told == "KV cache: 384 -> 240 bytes per token, where the server stores it as INT8"
    assert "int8_per_token_head" in served
    assert "no mainstream server loads calibrated INT8 scales" in KVCache.from_dict(STATIC).explain(spec, DATA)[1]


def test_only_static_calibrates(source: DenseCheckpoint) -> None:
    assert KVCache().unused() == {"calibration"} and "calibration" in KVCache.from_dict(STATIC).inputs()
    assert KVCache().memory(source.model_spec, Target(name="cpu")).totals == {"ram": 0, "vram": 0, "disk": 0}
    stage = KVCache.from_dict(STATIC)
    assert stage.memory(source.model_spec, Target(name="cpu"), DATA).totals["ram"] > 4 * 64 * 64 * 2
    on_gpu = stage.memory(source.model_spec, Target(name="gpu", gpus=1), DATA)
    assert on_gpu.vram["one decoder layer"] and list(on_gpu.ram) == ["calibration hidden states"]


def test_the_defaults_of_static_are_part_of_its_key_and_survive_the_way_to_the_worker() -> None:
    """A worker gets every field, also those that the recipe left out."""
    static = KVCache.from_dict({"mode": "static", "num_samples": None})
    assert (static.params.num_samples, static.params.max_length) == (128, 256)
    for stage in (static, KVCache()):
        again = KVCache.from_dict(stage.params.model_dump(mode="json"), stage.execution.model_dump(mode="json"))
        assert again.params == stage.params
    keys = [stage_key(KVCache.from_dict({"mode": "static", **given}), {}) for given in ({}, {"num_samples": 128}, {"num_samples": 64})]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("params", "execution", "sentence"),
    [
        ({"num_samples": 128}, {}, "num_samples: per_token_head needs no calibration, so it has no effect"),
        ({"max_length": 64}, {}, "max_length: per_token_head needs no calibration"),
        ({}, {"device": "cpu"}, "device: per_token_head needs no calibration"),
        ({"mode": "static"}, {}, "calibration: mode static needs a calibration set"),
        ({"mode": "static", "max_length": 257}, {}, "max_length: 257 is more than the model's 256 positions"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused_by_the_plan(
    source: DenseCheckpoint, params: dict[str, Any], execution: dict[str, Any], sentence: str
) -> None:
    stage = KVCache.from_dict(params, execution)
    with pytest.raises(ValueError, match=sentence):
        stage.infer(source.model_spec, *([DATA] if "max_length" in params and stage.inputs().get("calibration") else []))


@pytest.mark.parametrize("params", [{}, STATIC])
def test_the_same_mode_twice_is_a_mistake(source: DenseCheckpoint, params: dict[str, Any]) -> None:
    stage = KVCache.from_dict(params)
    once = stage.infer(source.model_spec, DATA)
    with pytest.raises(ValueError, match=rf"mode: the model's cache is {stage.params.mode} already; leave this stage out"):
        stage.infer(once, DATA)
