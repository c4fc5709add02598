"""Calibrated scales against what a cache of the resident model holds, and every way their file can be wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from pipeline.companions import SCALES_FILE
from pipeline.headers import CheckpointFileError
from pipeline.layout import KVCacheSpec
from stages.runtime.cache_scales import calibrate_scales, read_scales, scale_problems, write_scales
from tests.stages.models import make_checkpoint

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them

LAYERS, HEADS, CPU = 3, 2, torch.device("cpu")
STATIC = KVCacheSpec(layers=LAYERS, kv_heads=HEADS, head_dim=16, mode="static")
WINDOWS = torch.arange(5 * 200).view(5, 200) % 300  # two windows in a micro-batch, then one


def ignore(done: int, total: int) -> None: ...


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"attention_bias": True}), ("mistral", {"sliding_window": 12}), ("qwen3", {"head_dim": 32}), ("qwen2", {})],
)
def test_they_are_the_largest_magnitudes_that_a_cache_holds(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path, family, **settings)
    model, cache = AutoModelForCausalLM.from_pretrained(folder), DynamicCache()  # without the config: all tokens, whatever the window
    with torch.no_grad():
        model(WINDOWS, past_key_values=cache, use_cache=True, attention_mask=None)
    steps: list[tuple[int, int]] = []
    scales = calibrate_scales(folder, WINDOWS, CPU, torch.bfloat16, lambda *step: steps.append(step))
    for i, layer in enumerate(cache.layers):
        for name, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            expected = states.float().abs().amax((0, 2, 3)) / 127
            assert scales[f"layers.{i}.{name}"].dtype == torch.float32
            torch.testing.assert_close(scales[f"layers.{i}.{name}"], expected, rtol=0.01, atol=0)  # bf16, in other batches
    assert len(scales) == 2 * LAYERS and steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_head_that_gives_no_scale_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][16:] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the values of layer 1, KV head 1 reach 0 on the calibration text.*write per_token_head"):
        calibrate_scales(folder, WINDOWS, CPU, torch.bfloat16, ignore)
    weights["model.layers.0.self_attn.k_proj.weight"][3, 5] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the keys of layer 0, KV head 0 reach (nan|inf)"):
        calibrate_scales(folder, WINDOWS, CPU, torch.bfloat16, ignore)


def good() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.{name}": torch.full((HEADS,), 0.5) for i in range(LAYERS) for name in ("k_scale", "v_scale")}


def test_written_scales_are_read_back(tmp_path: Path) -> None:
    write_scales(tmp_path, good())
    assert scale_problems(tmp_path, STATIC) == []
    found = read_scales(tmp_path, LAYERS, HEADS)
    assert found.keys() == good().keys() and all(torch.equal(found[name], scale) for name, scale in good().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("layers.1.k_scale"), "layers.1.k_scale is missing"),
        (lambda s: s.update({"layers.3.k_scale": torch.ones(HEADS)}), "layers.3.k_scale is unexpected"),
        (lambda s: s.update({"layers.0.v_scale": torch.ones(4)}), "layers.0.v_scale is F32 [4], expected F32 [2]"),
        (lambda s: s.update({"layers.0.v_scale": torch.ones(2).half()}), "layers.0.v_scale is F16 [2], expected F32 [2]"),
        (lambda s: s["layers.2.k_scale"].fill_(torch.nan), "layers.2.k_scale holds a scale that is not finite and positive"),
        (lambda s: s["layers.2.k_scale"].mul_(-1), "layers.2.k_scale holds a scale that is not finite and positive"),
        (lambda s: s["layers.0.v_scale"][1:].zero_(), "layers.0.v_scale holds a scale that is not finite and positive"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], sentence: str) -> None:
    scales = good()
    change(scales)
    write_scales(tmp_path, scales)
    assert scale_problems(tmp_path, STATIC) == [f"{SCALES_FILE}: {sentence}"]
    with pytest.raises(CheckpointFileError, match="write it with the stage kv_cache"):
        read_scales(tmp_path, LAYERS, HEADS)


def test_only_a_static_cache_has_the_file(tmp_path: Path) -> None:
    assert scale_problems(tmp_path, STATIC) == [f"{SCALES_FILE} is missing"]
    write_scales(tmp_path, good())
    for mode in ("per_token_head", None):
        found = scale_problems(tmp_path, STATIC.model_copy(update={"mode": mode}))
        assert found == [f"{SCALES_FILE} is left over: only a static cache has calibrated scales"]
