"""Layer by layer gives the resident model's logits exactly, for every supported family, dense and packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

from stages.runtime import vocabulary
from stages.runtime.layerwise import LayerwiseModel, micro_batches, token_pieces
from stages.runtime.tensors import TensorReader
from tests.stages.models import DIMENSIONS, make_checkpoint, save_tensors

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3 rope, biased, sharded": {
        "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "shard_size": "50KB",
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral windowed": {"model_type": "mistral", "sliding_window": 8, "head_dim": 32},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied, two layer types": {
        "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(DIMENSIONS["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def resident_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids, attention_mask=mask, use_cache=False).logits.float()
    return logits


def layerwise_logits(model: LayerwiseModel, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    slices = [list(logits) for _, logits in model.logit_slices(hidden)]
    return [torch.cat(batch, -1) for batch in zip(*slices, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_resident_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(vocabulary, "VOCABULARY_ROWS", 100)  # four slices, the last in part
    folder = make_checkpoint(tmp_path, dtype=dtype, **FAMILIES[family])
    batches = [token_ids(2, 24), token_ids(1, 24, seed=1), token_ids(2, 17, seed=2)]
    model = LayerwiseModel(folder)
    hidden = model.sweep(batches)
    scores, head = model.score(hidden, batches), model.output_embedding()
    for ids, states, logits, score in zip(batches, hidden, layerwise_logits(model, hidden), scores, strict=True):
        expected = resident_logits(folder, ids)
        assert torch.equal(torch.nn.functional.linear(states, head).to(expected.dtype), expected)
        sliced = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(logits, expected, **sliced)  # some CPUs sum up a slice of the head in another order than all of it
        nll = torch.nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        torch.testing.assert_close(score.nll, nll, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(score.logsumexp, expected.logsumexp(-1), atol=1e-4, rtol=1e-5)


def test_padded_batches_equal_the_resident_models(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype=torch.float32)
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0  # left
    mask[1, 13:] = 0  # right
    model = LayerwiseModel(folder)
    plain, padded = layerwise_logits(model, model.sweep([ids, ids], masks=[None, mask]))
    assert torch.equal(plain, resident_logits(folder, ids))
    assert torch.equal(padded[mask.bool()], resident_logits(folder, ids, mask)[mask.bool()])
    assert not torch.equal(plain[mask.bool()], padded[mask.bool()])


@pytest.mark.parametrize("change", [{"sliding_window": None}, {"rope_parameters": LLAMA3_ROPE}, {"rms_norm_eps": 0.1}], ids=str)
def test_a_config_that_differs_gives_other_logits(tmp_path: Path, change: dict[str, Any]) -> None:
    """The control: equality above is not for want of sensitivity to masks, rotary embeddings and norms."""
    folder = make_checkpoint(tmp_path, "mistral", sliding_window=8, head_dim=32)
    ids = token_ids(1, 40)
    expected = resident_logits(folder, ids)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    model = LayerwiseModel(folder)
    (logits,) = layerwise_logits(model, model.sweep([ids]))
    assert (logits - expected).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (2, True), (8, True)])
def test_packed_layers_equal_transformers_own_loading(tmp_path: Path, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    dense = make_checkpoint(tmp_path / "dense", dtype=dtype, intermediate_size=128)
    folder = pack(dense, tmp_path / "packed", bits, symmetric)
    ids = token_ids(2, 24)
    model = LayerwiseModel(folder)
    (logits,) = layerwise_logits(model, model.sweep([ids]))
    assert torch.equal(logits, resident_logits(folder, ids))
    assert not torch.equal(logits, resident_logits(dense, ids))


def test_a_packed_head_is_unpacked(tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", intermediate_size=128)
    folder = pack(dense, tmp_path / "packed", 8, True, ignore=())
    ids = token_ids(1, 12)
    model = LayerwiseModel(folder)
    (logits,) = layerwise_logits(model, model.sweep([ids]))
    assert torch.equal(logits, resident_logits(folder, ids))


def pack(source: Path, target: Path, bits: int, symmetric: bool, ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """Round every linear layer but `ignore` to nearest in groups of 32 and save it in compressed-tensors' own layout."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    quantization = QuantizationConfig.model_validate(
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized", "ignore": list(ignore),
         "quantization_status": "compressed"}
    )  # fmt: skip
    scheme = quantization.config_groups["group_0"]
    compressor, reader = BaseCompressor.get_value_from_registry("pack-quantized"), TensorReader(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.table:
        weight = reader.read(name)
        if "norm" in name or "embed" in name or name.removesuffix(".weight") in ignore:
            tensors[name] = weight
            continue
        groups = weight.unflatten(1, (-1, 32))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        for suffix, tensor in compressor.compress(state, scheme).items():
            if tensor is not None and not (symmetric and suffix == "weight_zero_point"):
                tensors[name.removesuffix("weight") + suffix] = tensor
    save_tensors(target, tensors)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = json.loads(quantization.model_dump_json())
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_hooks_see_what_they_see_on_the_resident_model_and_are_removed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    batches = micro_batches(token_ids(4, 16), tokens=32)
    assert [tuple(batch.shape) for batch in batches] == [(2, 16), (2, 16)]
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected = [resident.model(ids, output_hidden_states=True, use_cache=False).hidden_states for ids in batches]
    seen: list[tuple[int, torch.Tensor]] = []
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    model = LayerwiseModel(folder)
    model.sweep(
        batches,
        on_layer=lambda i, layer: [layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append((i, inputs[0])))],
        on_output=lambda i, b, before, after: outputs.update({(i, b): before.clone()}),
    )
    assert [i for i, _ in seen] == [0, 0, 1, 1, 2, 2] and all(x.shape == (2, 16, 96) for _, x in seen)
    assert len(outputs) == 6 and all(torch.equal(before, expected[b][i]) for (i, b), before in outputs.items())
    assert not any(layer.mlp.down_proj._forward_pre_hooks for layer in model.layers)
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"is not the model its config\.json describes: model\.layers\.3\.\S+ is missing"):
        LayerwiseModel(folder)


def test_a_second_sweep_and_a_named_device_give_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", head_dim=32)
    batches = [token_ids(2, 24), token_ids(1, 17, seed=1)]
    model = LayerwiseModel(folder, device="cpu")
    first, second, plain = (m.sweep(batches) for m in (model, model, LayerwiseModel(folder)))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, plain, strict=True))


def test_a_layer_in_use_is_on_the_device_and_nothing_else_is_left_on_meta(tmp_path: Path) -> None:
    """What is on `meta` has no values: only layers that are not in use may be there."""
    model = LayerwiseModel(make_checkpoint(tmp_path), device="cpu")
    assert not any(buffer.is_meta for buffer in model.decoder.buffers())
    model.sweep([token_ids(1, 8)], on_layer=lambda i, layer: [_all_are_on(layer, torch.device("cpu"))])
    assert all(parameter.is_meta for parameter in model.decoder.parameters())


def _all_are_on(layer: torch.nn.Module, device: torch.device) -> torch.utils.hooks.RemovableHandle:
    def check(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> None:
        tensors = [*module.parameters(), *module.buffers(), *arguments, *keywords["position_embeddings"]]
        assert len(tensors) > 10 and all(tensor.device == device for tensor in tensors)

    return layer.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.parametrize("pieces", [7, 512])
def test_the_top_logits_are_the_resident_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr(vocabulary, "VOCABULARY_ROWS", 100)
    folder = make_checkpoint(tmp_path, dtype=torch.float32)
    batches = [token_ids(2, 24), token_ids(1, 17, seed=1)]
    model = LayerwiseModel(folder)
    hidden = token_pieces(model.sweep(batches), tokens=pieces)
    assert all(len(piece) <= pieces for piece in hidden)
    found = model.top_logits(hidden, k=120, temperature=3.0)  # more words than a slice has
    expected = torch.cat([resident_logits(folder, ids).flatten(0, 1) for ids in batches])
    ids, logits, log_sums = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    torch.testing.assert_close(logits, expected.topk(120).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(-1, ids), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_sums, (expected / 3.0).logsumexp(-1), atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_an_accelerator_gives_the_cpus_scores(tmp_path: Path) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None, "pytest -m gpu needs an accelerator"
    folder = make_checkpoint(tmp_path, dtype=torch.float32, intermediate_size=128)
    batches, mask = [token_ids(2, 24), token_ids(1, 24, seed=1), token_ids(2, 17, seed=2)], torch.ones(2, 17, dtype=torch.int64)
    mask[0, 13:] = 0
    for source in (folder, pack(folder, tmp_path / "packed", 4, symmetric=False)):
        results = []
        for model in (LayerwiseModel(source), LayerwiseModel(source, device=device)):
            seen: list[torch.device] = []
            hidden = model.sweep(batches, masks=[None, None, mask], on_output=lambda i, b, before, after: seen.append(after.device))  # noqa: B023
            assert {where.type for where in seen} == {model.device.type} and all(h.device.type == "cpu" for h in hidden)
            results.append((model.score(hidden, batches), model.top_logits(token_pieces(hidden), 5, 2.0)))
        (scores, tops), (gpu_scores, gpu_tops) = results
        for one, other in zip(scores[:2], gpu_scores[:2], strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(tops[0].logits[:64], gpu_tops[0].logits[:64], atol=1e-3, rtol=1e-3)
