"""Each way a checkpoint can be wrong, done to a real one, is refused with a sentence that names it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.companions import SCALES_FILE
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.stage import Context
from stages.rtn import RTN
from stages.runtime import inspection
from stages.runtime.guard import check_checkpoint, check_probe
from stages.runtime.loading import load_model
from stages.runtime.scoring import token_losses
from tests.stages.models import make_checkpoint

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def packed(tmp_path: Path) -> QuantizedCheckpoint:
    source = DenseCheckpoint(make_checkpoint(tmp_path / "source"))
    return RTN.from_dict({"group_size": 32}).run(Context(tmp_path / "packed", lambda event: None), source)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w[f"{Q}.weight_scale"][3].fill_(torch.nan), f"{Q}.weight_scale holds nan or inf"),
        (lambda w: w["lm_head.weight"][306].fill_(torch.inf), "lm_head.weight holds nan or inf"),
        (lambda w: (w["lm_head.weight"][5].fill_(torch.inf), w["lm_head.weight"][6].fill_(-torch.inf)), "lm_head.weight holds nan or inf"),
        (lambda w: w.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
        (lambda w: w.update({"model.norm.bias": torch.zeros(64)}), "model.norm.bias is unexpected"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64)}), "model.norm.weight is F32"),
        (lambda w: w.update({f"{Q}.weight_scale": torch.ones(64, 4, dtype=torch.bfloat16)}), rf"{Q}.weight_scale is BF16 \[64, 4\]"),
        (lambda w: w[f"{Q}.weight_shape"].fill_(32), rf"{Q}.weight_shape holds \[32, 32\], expected \[64, 64\]"),
    ],
)
def test_damaged_weights(packed: QuantizedCheckpoint, change: Callable, sentence: str) -> None:
    check_checkpoint(packed.path, packed.spec)
    edit_weights(packed.path, change)
    with pytest.raises(ValueError, match=sentence):
        check_checkpoint(packed.path, packed.spec)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("quantization_config"), "quantization_config describes other layers or another scheme"),
        (lambda c: c["quantization_config"].update(ignore=[]), "quantization_config describes other layers"),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=16), "another scheme"),
        (lambda c: c.update(dtype="float16"), "config.json says dtype F16, expected BF16"),
        (lambda c: c.update(head_dim="16"), "config.json: head_dim is '16'; input should be a valid integer"),
        (lambda c: c.update(num_hidden_layers=2), "config.json says num_layers 2, expected 3"),
    ],
)
def test_a_config_that_is_not_the_files(packed: QuantizedCheckpoint, change: Callable, sentence: str) -> None:
    edit_config(packed.path, change)
    with pytest.raises(ValueError, match=sentence):
        check_checkpoint(packed.path, packed.spec)


def test_large_but_finite_weights_pass_in_small_blocks(packed: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sum overflows, none of them does."""
    monkeypatch.setattr(inspection, "BLOCK_BYTES", 1000)
    edit_weights(packed.path, lambda w: w["lm_head.weight"].fill_(3e38))
    check_checkpoint(packed.path, packed.spec)
    edit_weights(packed.path, lambda w: w["lm_head.weight"][300].fill_(-torch.inf))
    with pytest.raises(ValueError, match=r"lm_head\.weight holds nan or inf"):
        check_checkpoint(packed.path, packed.spec)


def test_the_first_problems_are_shown_and_the_rest_counted(packed: QuantizedCheckpoint) -> None:
    edit_weights(packed.path, lambda w: [w.pop(name) for name in list(w) if name.endswith("scale")])
    with pytest.raises(ValueError, match=r"and 16 more$"):
        check_checkpoint(packed.path, packed.spec)


def test_a_cache_that_is_not_the_planned_one(packed: QuantizedCheckpoint) -> None:
    plain = packed.model_spec
    check_checkpoint(packed.path, plain)
    with pytest.raises(ValueError, match=r"kv_cache\.json is missing, expected per_token_head"):
        check_checkpoint(packed.path, plain.with_cache("per_token_head"))
    write_cache(packed.path, CacheSettings(mode="per_token_head"))
    check_checkpoint(packed.path, plain.with_cache("per_token_head"))
    with pytest.raises(ValueError, match=r"kv_cache\.json says mode per_token_head, expected no INT8 cache"):
        check_checkpoint(packed.path, plain)
    with pytest.raises(ValueError, match=r"kv_cache\.json says mode per_token_head, expected static"):
        check_checkpoint(packed.path, plain.with_cache("static"))


def test_scales_that_are_not_those_of_a_static_cache(packed: QuantizedCheckpoint) -> None:
    static, scales = packed.model_spec.with_cache("static"), {f"layers.{i}.{name}_scale": torch.ones(2) for i in range(3) for name in "kv"}
    write_cache(packed.path, CacheSettings(mode="static"))
    with pytest.raises(ValueError, match=r"kv_cache\.safetensors is missing"):
        check_checkpoint(packed.path, static)
    save_file(scales, packed.path / SCALES_FILE)
    check_checkpoint(packed.path, static)
    save_file(scales | {"layers.1.k_scale": torch.tensor([1.0, 0.0])}, packed.path / SCALES_FILE)
    with pytest.raises(ValueError, match=r"layers\.1\.k_scale holds a scale that is not finite and positive"):
        check_checkpoint(packed.path, static)
    write_cache(packed.path, CacheSettings(mode="per_token_head"))
    with pytest.raises(ValueError, match=r"kv_cache\.safetensors is left over"):
        check_checkpoint(packed.path, packed.model_spec.with_cache("per_token_head"))


def test_the_probe_passes_for_the_model_itself_and_fails_for_another(packed: QuantizedCheckpoint) -> None:
    ids = torch.arange(60).view(2, 30)
    losses = token_losses(load_model(packed.path), ids)
    check_probe(losses, packed.path, ids)
    edit_weights(packed.path, lambda w: w[f"{Q}.weight_scale"].mul_(1.5))
    check_checkpoint(packed.path, packed.spec)  # shapes and values look right
    with pytest.raises(ValueError, match="does not reload as the model that was made"):
        check_probe(losses, packed.path, ids)
