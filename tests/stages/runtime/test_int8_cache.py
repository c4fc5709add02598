"""The INT8 cache against transformers' own cache fed with values that were rounded beforehand: the two must agree exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from pipeline.companions import CACHE_FILE, SCALES_FILE
from pipeline.headers import CheckpointFileError
from pipeline.kv_sidecar import CacheSettings, write_cache
from stages.runtime.int8_cache import GROWTH_TOKENS, Int8Cache, Int8Layer, load_cache
from tests.stages.models import make_checkpoint

WINDOW = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "head_dim": 32},
}
LAYERS, HEADS = 3, 2


class RoundedCache(DynamicCache):
    """Stores what INT8 can represent, in the model's dtype. `scales` as of a static cache."""

    def __init__(self, config: Any, scales: dict[str, torch.Tensor] | None) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        return super().update(self.rounded(keys, layer, "k"), self.rounded(values, layer, "v"), layer, *rest, **more)

    def rounded(self, states: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        if self.scales is None:
            scale = states.abs().max(-1, keepdim=True).values / 127
        else:
            scale = self.scales[f"layers.{layer}.{name}_scale"][:, None, None]
        return scale * torch.round(states / scale).clamp(-127, 127)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, torch.float32, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(params=["per_token_head", "static"])
def scales(request: pytest.FixtureRequest) -> dict[str, torch.Tensor] | None:
    if request.param == "per_token_head":
        return None
    names = [f"layers.{i}.{name}_scale" for i in range(LAYERS) for name in "kv"]
    return {name: 0.02 + 0.01 * torch.rand(HEADS, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(names)}


def int8(config: Any, scales: dict[str, torch.Tensor] | None) -> Int8Cache:
    return Int8Cache(config, CacheSettings(mode="static" if scales else "per_token_head"), scales)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, cache: Any, pieces: list[int]) -> torch.Tensor:
    """Of `ids` given in pieces of those lengths."""
    return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(pieces, 1)], 1)


@pytest.mark.parametrize("pieces", [[40], [7, *[1] * 8], [5, 20, 1, 14]], ids=["at once", "token by token", "in pieces"])
def test_it_computes_what_a_cache_of_rounded_values_does(model: Any, scales: Any, pieces: list[int]) -> None:
    ids = tokens(2, sum(pieces))
    found = logits(model, ids, int8(model.config, scales), pieces)
    assert torch.equal(found, logits(model, ids, RoundedCache(model.config, scales), pieces))


def test_one_forward_over_a_text_is_token_by_token_decoding(model: Any, scales: Any) -> None:
    """Up to the order of float additions, which now and then rounds a value to its other neighbour; far below the INT8 error."""
    ids = tokens(2, 30)
    at_once = logits(model, ids, int8(model.config, scales), [30])
    decoded = logits(model, ids, int8(model.config, scales), [1] * 30)
    error = (at_once - model(ids, use_cache=False).logits).detach().abs().mean()
    assert error > 1e-3
    assert (at_once - decoded).abs().mean() < error / 50


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 4, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "assisted"],
)
def test_generate_makes_the_tokens_of_a_cache_of_rounded_values(model: Any, how: dict[str, Any]) -> None:
    ids = tokens(1, 10).repeat(1, 2) if "prompt_lookup_num_tokens" in how else tokens(2, 20)
    made = []
    for cache in (int8(model.config, None), RoundedCache(model.config, None)):
        arguments = {"do_sample": False, "max_new_tokens": 15, "pad_token_id": 306, **how}
        made.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments))
    assert torch.equal(*made)


def test_padding_on_the_left_changes_nothing_of_a_row(model: Any) -> None:
    ids, pad = tokens(1, 9), 4
    padded = torch.cat([torch.full((1, pad), 306), ids], 1)
    batch, mask = torch.cat([tokens(1, 13), padded]), torch.ones(2, 13, dtype=torch.int64)
    mask[1, :pad] = 0
    arguments = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 306}
    together = model.generate(batch, attention_mask=mask, past_key_values=int8(model.config, None), **arguments)
    alone = model.generate(ids, past_key_values=int8(model.config, None), **arguments)
    assert torch.equal(together[1, pad:], alone[0])


def test_rows_can_be_chosen_and_repeated(model: Any, scales: Any) -> None:
    ids, cache = tokens(3, 30), int8(model.config, scales)
    logits(model, ids[:, :20], cache, [20])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    chosen = ids[[0, 0, 2, 2]]
    expected = logits(model, chosen, RoundedCache(model.config, scales), [20, 10])[:, 20:]
    assert torch.allclose(logits(model, chosen[:, 20:], cache, [10]), expected, atol=1e-2)


def test_crop_goes_back_as_if_the_tokens_had_never_been(model: Any, scales: Any) -> None:
    ids, cache = tokens(2, 40), int8(model.config, scales)
    logits(model, ids[:, :9], cache, [9])
    cache.activate_past_recording()
    logits(model, tokens(2, 7) + 1, cache, [7])
    cache.crop(-7)
    assert cache.get_seq_length() == 9
    expected = logits(model, ids, RoundedCache(model.config, scales), [9, 31])[:, 9:]
    assert torch.equal(logits(model, ids[:, 9:], cache, [31]), expected)


def test_what_left_the_window_does_not_come_back() -> None:
    layer = Int8Layer(4, None, None)
    layer.update(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    with pytest.raises(ValueError, match=r"crop\(-1\): 3 tokens of 6 are still stored.*activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="give minus the number of tokens"):
        layer.crop(3)
    layer.crop(0)
    assert (layer.length, layer.get_seq_length(), layer.get_mask_sizes(1)) == (3, 6, (4, 3))


@pytest.mark.parametrize("window", [None, 5])
def test_nothing_but_int8_and_scales_is_kept_between_calls(window: int | None) -> None:
    layer = Int8Layer(window, None, None)
    for length in (7, 1, 1):
        keys = torch.randn(3, 2, length, 16, dtype=torch.bfloat16)
        returned = layer.update(keys, keys)
    assert layer.stored and returned[0].dtype == torch.bfloat16
    kept = [value for vectors in layer.stored for value in vars(vectors).values() if isinstance(value, torch.Tensor)]
    assert {(t.dtype, t.shape[-1]) for t in kept} == {(torch.int8, 16), (torch.float32, 1)}
    others = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not others and layer.nbytes == sum(t.untyped_storage().nbytes() for t in kept)


def test_a_prompt_takes_exactly_the_bytes_of_the_spec_and_decoding_a_bounded_room(model: Any, scales: Any) -> None:
    cache, ids = int8(model.config, scales), tokens(2, 11)
    logits(model, ids, cache, [11])
    per_token = 2 * LAYERS * HEADS * (model.config.head_dim + (0 if scales else 4))
    assert cache.nbytes == 2 * 11 * per_token and cache.bytes_per_token == per_token and cache.bytes_per_sequence == 11 * per_token
    logits(model, tokens(2, 3), cache, [1, 1, 1])
    assert cache.nbytes <= 2 * (11 + GROWTH_TOKENS) * per_token


def test_reset_gives_the_memory_back(model: Any) -> None:
    cache, ids = int8(model.config, None), tokens(2, 15)
    first = logits(model, ids, cache, [15])
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert torch.equal(logits(model, ids, cache, [15]), first)


def test_a_folder_tells_which_cache_it_wants(folder: Path, model: Any, scales: Any) -> None:
    assert load_cache(folder, model.config) is None
    try:
        write_cache(folder, CacheSettings(mode="static" if scales else "per_token_head"))
        if scales:
            with pytest.raises(CheckpointFileError, match=f"{SCALES_FILE} is missing"):
                load_cache(folder, model.config)
            save_file(scales, folder / SCALES_FILE)
        cache = load_cache(folder, model.config)
        assert cache is not None
        assert torch.equal(logits(model, tokens(1, 9), cache, [9]), logits(model, tokens(1, 9), RoundedCache(model.config, scales), [9]))
        if scales:
            save_file({**scales, "layers.2.v_scale": torch.ones(3)}, folder / SCALES_FILE)
            with pytest.raises(CheckpointFileError, match=r"layers\.2\.v_scale is F32 \[3\], expected F32 \[2\]"):
                load_cache(folder, model.config)
    finally:
        for name in (CACHE_FILE, SCALES_FILE):
            (folder / name).unlink(missing_ok=True)


def test_layers_of_another_kind_and_scales_without_use_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="mode static needs its calibrated scales"):
        Int8Cache(model.config, CacheSettings(mode="static"))
    with pytest.raises(ValueError, match="mode per_token_head has no calibrated scales"):
        Int8Cache(model.config, CacheSettings(mode="per_token_head"), {})
    config = type(model.config)(**{**model.config.to_dict(), "layer_types": None})
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"config\.json has linear_attention"):
        Int8Cache(config, CacheSettings(mode="per_token_head"))
