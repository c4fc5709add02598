"""What is pruned is a stock model: the one that was planned, with the logits of the source cut by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.architecture import Architecture
from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import tensor_table
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.tensors import TensorReader, copy_companions
from stages.runtime.text import calibration_windows, load_tokenizer
from stages.structured_prune import StructuredPrune
from tests.stages.models import make_checkpoint, save_tensors, write_documents
from tests.stages.test_layerwise import LLAMA3_ROPE

pytestmark = pytest.mark.usefixtures("bf16_units")  # what is planned is planned for a processor that has them


def prune(source: Path, target: Path, calibration: Path | None = None, **params: Any) -> tuple[DenseCheckpoint, list[dict[str, Any]]]:
    stage, events = StructuredPrune.from_dict(params), []
    target.mkdir()
    data = Dataset(calibration) if calibration else None
    result = stage.run(Context(target, events.append), DenseCheckpoint(source), data)
    spec = DatasetSpec(split="calibration", digest="00", nbytes=calibration.stat().st_size) if calibration else None
    assert result.model_spec == stage.infer(DenseCheckpoint(source).model_spec, spec)
    return result, events


def load(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % 307
    result: torch.Tensor = model(ids, use_cache=False).logits.float()
    return result


# ---- A plain reference: the resident model, its scores by the papers' formulas, its matrices indexed by hand.


def resident_statistics(model: Any, windows: torch.Tensor, head_dim: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Neuron and head scores of each layer and block influence, from one resident forward over all windows."""
    neurons: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: neurons.append(x[0].double().abs().mean((0, 1))))
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, x: heads.append(x[0].double().unflatten(-1, (-1, head_dim)).norm(dim=-1).mean((0, 1)))
        )
        layer.register_forward_hook(lambda _, x, y: hidden.append(torch.nn.functional.cosine_similarity(x[0].double(), y.double(), -1)))
    with torch.no_grad():
        model(windows, use_cache=False)
    return neurons, heads, torch.stack([1 - cosine.mean() for cosine in hidden])


@torch.no_grad()
def weight_statistics(model: Any, a: Architecture) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Neuron and head scores of each layer: products of norms."""
    neurons, heads, shared = [], [], a.num_heads // a.num_kv_heads
    for layer in model.model.layers:
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        neurons.append(gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0))
        q, k, v, o = (getattr(layer.self_attn, f"{name}_proj").weight.double() for name in "qkvo")
        score = o.T.reshape(a.num_heads, -1).norm(dim=1) * v.view(a.num_kv_heads, -1).norm(dim=1).repeat_interleave(shared)
        if not a.qk_norm:
            score *= q.view(a.num_heads, -1).norm(dim=1) * k.view(a.num_kv_heads, -1).norm(dim=1).repeat_interleave(shared)
        heads.append(score)
    return neurons, heads


@torch.no_grad()
def keep(linear: torch.nn.Linear, indices: list[int], dimension: int) -> None:
    linear.weight = torch.nn.Parameter(linear.weight.index_select(dimension, torch.tensor(indices)))
    if dimension == 0 and linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias[indices])


def top(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


def cut_by_hand(folder: Path, new: Architecture, mode: str, windows: torch.Tensor | None, activation: bool) -> Any:
    """The loaded source with everything but the kept units removed from its modules."""
    a = DenseCheckpoint(folder).model_spec.architecture
    neurons, heads = weight_statistics(load(folder), a)
    influence = torch.zeros(a.num_layers)
    if windows is not None:
        measured_neurons, measured_heads, influence = resident_statistics(load(folder), windows, a.head_dim)
        neurons, heads = (measured_neurons, measured_heads) if activation else (neurons, heads)
    model, shared = load(folder), a.num_heads // a.num_kv_heads
    for layer, neuron_scores, head_scores in zip(model.model.layers, neurons, heads, strict=True):
        kept = top(neuron_scores, new.intermediate_size)
        for name, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            keep(getattr(layer.mlp, name), kept, dimension)
        groups, queries = list(range(a.num_kv_heads)), list(range(a.num_heads))
        if mode == "groups":
            groups = top(head_scores.view(-1, shared).sum(1), new.num_kv_heads)
            queries = [g * shared + j for g in groups for j in range(shared)]
        else:
            per_group = new.num_heads // a.num_kv_heads
            queries = [g * shared + j for g in groups for j in top(head_scores.view(-1, shared)[g], per_group)]
        attention = layer.self_attn
        attention.num_key_value_groups = new.num_heads // new.num_kv_heads
        for name, dimension, kept_heads in (("q_proj", 0, queries), ("k_proj", 0, groups), ("v_proj", 0, groups), ("o_proj", 1, queries)):
            keep(getattr(attention, name), [h * a.head_dim + d for h in kept_heads for d in range(a.head_dim)], dimension)
    if new.num_layers < a.num_layers:
        layers = top(influence, new.num_layers)
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        model.config.num_hidden_layers = len(layers)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in layers]
    return model


WIDTH = {"head_ratio": 0.5, "mlp_ratio": 0.3, "round_to": 16, "group_size": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, WIDTH),
    "llama tied, sharded": ({"tie_word_embeddings": True, "shard_size": "40KB"}, WIDTH),
    "llama biased": ({"attention_bias": True, "mlp_bias": True}, WIDTH | {"heads": "queries"}),
    "llama becoming mistral": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-3},
        {"num_kv_heads": 3, "group_size": 16},
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": 6}, WIDTH),
    "qwen2": ({"model_type": "qwen2", "tie_word_embeddings": True}, WIDTH),
    "qwen3 queries": ({"model_type": "qwen3", "head_dim": 32, "shard_size": "40KB"}, WIDTH | {"heads": "queries"}),
    "llama by activation": ({"dtype": torch.float32}, WIDTH | {"importance": "activation"}),
    "qwen3 by activation, queries": ({"model_type": "qwen3", "head_dim": 16}, WIDTH | {"importance": "activation", "heads": "queries"}),
    "llama layers": ({"num_hidden_layers": 5}, {"layer_ratio": 0.4}),
    "qwen2 windowed layers and MLP": ({"model_type": "qwen2", **WINDOWED}, {"num_layers": 2, "intermediate_size": 48, "group_size": 16}),
    "everything by activation": (
        {"num_hidden_layers": 4, "tie_word_embeddings": True, "dtype": torch.float32},
        WIDTH | {"layer_ratio": 0.25, "importance": "activation"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_equals_the_source_cut_by_hand(tmp_path: Path, case: str) -> None:
    settings, params = CASES[case]
    source = make_checkpoint(tmp_path / "source", **settings)
    stage, calibration = StructuredPrune.from_dict(params), None
    if "calibration" not in stage.unused():
        computed = "fp32" if settings.get("dtype") == torch.float32 else "bf16"
        params = params | {"num_samples": 6, "max_length": 32, "compute_dtype": computed}
        calibration = write_documents(tmp_path / "calibration.jsonl")
    result, events = prune(source, tmp_path / "pruned", calibration, **params)

    assert ModelSpec.from_config(result.config) == result.spec
    assert isinstance(result.spec, ModelSpec) and result.spec.differences(tensor_table(result.path)) == []
    assert sum(entry.nbytes for entry in tensor_table(result.path).values()) == result.spec.nbytes
    assert load_tokenizer(result.path)("Pruning removes")["input_ids"] == load_tokenizer(source)("Pruning removes")["input_ids"]
    layers = result.spec.architecture.num_layers
    assert events[-1] == {"event": "progress", "label": "pruning", "done": layers, "total": layers}
    windows = calibration_windows(Dataset(calibration), load_tokenizer(source), 6, 32) if calibration else None
    reference = cut_by_hand(source, result.spec.architecture, stage.params.heads, windows, stage.params.importance == "activation")
    assert torch.equal(logits(load(result.path)), logits(reference))
    assert not torch.allclose(logits(load(result.path)), logits(load(source)), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "legacy", "params"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4},
            {"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
            {"num_kv_heads": 3, "group_size": 16},
        ),
        ({"model_type": "qwen2"}, {"rope_theta": 5000.0, **WINDOWED}, {"num_layers": 2, "num_samples": 6, "max_length": 32}),
    ],
    ids=["llama 3.1", "qwen2 windowed"],
)
def test_configs_as_transformers_4_wrote_them(
    tmp_path: Path, settings: dict[str, Any], legacy: dict[str, Any], params: dict[str, Any]
) -> None:
    """Most published folders: `torch_dtype`, `rope_theta` and `rope_scaling` at the top, no `head_dim`, no `layer_types`."""
    source = make_checkpoint(tmp_path / "source", **settings)
    config = json.loads((source / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "rope_parameters", "layer_types", "head_dim")}
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"} | legacy))
    calibration = write_documents(tmp_path / "calibration.jsonl")
    result, _ = prune(source, tmp_path / "pruned", calibration, **params)
    windows = calibration_windows(Dataset(calibration), load_tokenizer(source), 6, 32)
    reference = cut_by_hand(source, result.model_spec.architecture, "groups", windows, activation=False)
    assert torch.equal(logits(load(result.path)), logits(reference))


def test_what_old_savers_left_in_the_files_is_not_carried_along(tmp_path: Path) -> None:
    """Rotary buffers and a copy of the tied embedding: every reader ignores them."""
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = TensorReader(source)
    weights = {name: tensors.read(name) for name in tensors.table}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = weights["model.rotary_emb.inv_freq"] = torch.ones(8)
    save_tensors(tmp_path / "old", weights)
    copy_companions(source, tmp_path / "old", DenseCheckpoint(source).config)
    old, _ = prune(tmp_path / "old", tmp_path / "from_old", **WIDTH)
    clean, _ = prune(source, tmp_path / "from_clean", **WIDTH)
    assert tensor_table(old.path).keys() == tensor_table(clean.path).keys()
    assert torch.equal(logits(load(old.path)), logits(load(clean.path)))


def test_a_model_that_overflows_is_not_ranked(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    tensors = TensorReader(source)
    weights = {name: tensors.read(name) for name in tensors.table}
    weights["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
    save_tensors(tmp_path / "damaged", weights)
    copy_companions(source, tmp_path / "damaged", DenseCheckpoint(source).config)
    calibration = write_documents(tmp_path / "calibration.jsonl")
    with pytest.raises(ValueError, match=r"activations of layer 1 are nan or infinite"):
        prune(tmp_path / "damaged", tmp_path / "pruned", calibration, **WIDTH, importance="activation", num_samples=2, max_length=16)


def test_removed_neurons_are_worth_what_zeroed_ones_are(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.float32)
    result, _ = prune(source, tmp_path / "pruned", intermediate_size=48, group_size=16)
    model = load(source)
    neurons, _ = weight_statistics(model, DenseCheckpoint(source).model_spec.architecture)
    with torch.no_grad():
        for layer, scores in zip(model.model.layers, neurons, strict=True):
            gone = [i for i in range(96) if i not in top(scores, 48)]
            layer.mlp.down_proj.weight[:, gone] = 0
    torch.testing.assert_close(logits(load(result.path)), logits(model), atol=1e-4, rtol=1e-4)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", shard_size="40KB")
    calibration = write_documents(tmp_path / "calibration.jsonl")
    params = WIDTH | {"importance": "activation", "layer_ratio": 0.3, "num_samples": 6, "max_length": 32}
    contents = []
    for name in ("once", "again"):
        result, _ = prune(source, tmp_path / name, calibration, **params)
        contents.append({file.name: file.read_bytes() for file in result.path.iterdir()})
    assert contents[0] == contents[1]


def test_an_unfinished_attempt_is_overwritten(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    clean, _ = prune(source, tmp_path / "clean", **WIDTH)
    left = tmp_path / "left"
    left.mkdir()
    (left / "shard-00007.partial").write_bytes(b"half a tensor")
    StructuredPrune.from_dict(WIDTH).run(Context(left, lambda event: None), DenseCheckpoint(source))
    assert {f.name: f.read_bytes() for f in left.iterdir()} == {f.name: f.read_bytes() for f in clean.path.iterdir()}


def test_files_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 112}))
    with pytest.raises(ValueError, match=r"is not the model its config\.json describes: model\.layers\.0\.mlp\.gate_proj\.weight is BF16"):
        prune(source, tmp_path / "pruned", **WIDTH)


def test_a_missing_calibration_set_is_named(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match=r"calibration: .* need a calibration set"):
        StructuredPrune.from_dict({"layer_ratio": 0.3}).infer(DenseCheckpoint(source).model_spec)
