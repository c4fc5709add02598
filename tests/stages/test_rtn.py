"""RTN against its definition, against llm-compressor, and against the spec the plan inferred."""

import json
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.headers import tensor_table
from pipeline.stage import Context
from pipeline.target import Target
from stages.rtn import RTN
from stages.runtime import packing
from stages.runtime.guard import check_checkpoint
from tests.stages.models import make_checkpoint


def quantize(source: Path, output: Path, **params: object) -> QuantizedCheckpoint:
    stage = RTN.from_dict({"group_size": 32, **params})
    return stage.run(Context(output, lambda event: None), DenseCheckpoint(source))


def rounded(weight: torch.Tensor, num_bits: int, symmetric: bool, group_size: int = 32) -> torch.Tensor:
    """The textbook formula, in the weight's own dtype as the format stores it."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-least, most) / ((high - low) / 2)
        zero = torch.zeros_like(scale)
    else:
        scale = (most - least) / (high - low)
        zero = (low - least / scale).clamp(low, high).round()
    return (((groups / scale + zero).round().clamp(low, high) - zero) * scale).view_as(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_stock_transformers_reads_the_rounded_weights(tmp_path: Path, num_bits: int, symmetric: bool) -> None:
    source = make_checkpoint(tmp_path / "source")
    made = quantize(source, tmp_path / "out", num_bits=num_bits, symmetric=symmetric, ignore=["re:.*o_proj"])
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "o_proj" not in name:
                parameter.copy_(rounded(parameter, num_bits, symmetric))
        ids = torch.arange(40).view(2, 20)
        stock = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto")
        assert torch.equal(stock(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"shard_size": "40KB", "num_hidden_layers": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
        {"model_type": "mistral", "vocab_size": 401, "dtype": torch.float16},
        {"dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "params", [{"num_bits": 3, "symmetric": False, "ignore": []}, {"ignore": ["lm_head", "re:.*layers.1.mlp.*"]}], ids=str
)
def test_the_inferred_spec_is_what_stands_on_disk(tmp_path: Path, config: dict, params: dict) -> None:
    source = make_checkpoint(tmp_path / "source", **config)
    inferred = RTN.from_dict({"group_size": 32, **params}).infer(DenseCheckpoint(source).model_spec)
    made = quantize(source, tmp_path / "out", **params)
    table = tensor_table(made.path)
    assert {name: (entry.dtype, entry.shape) for name, entry in table.items()} == inferred.tensors()
    assert sum(entry.nbytes for entry in table.values()) == inferred.nbytes
    assert made.spec == inferred
    check_checkpoint(made.path, inferred)


@pytest.mark.parametrize("observer", [{}, {"observer": "mse"}, {"observer": "mse", "maxshrink": 0.29}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_it_equals_llm_compressors_own_round_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bits: int, symmetric: bool, observer: dict
) -> None:
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 64 * 32)  # several blocks of rows, over all of which the library's search goes on or ends
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1)
    weights = {"num_bits": num_bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    weights |= {"observer": f"memoryless_{observer.get('observer', 'minmax')}"}
    weights |= {"observer_kwargs": {"maxshrink": observer["maxshrink"]}} if "maxshrink" in observer else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    group = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(model=model, recipe=[QuantizationModifier(config_groups=group, ignore=["lm_head"])])
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    made = quantize(source, tmp_path / "ours", num_bits=num_bits, symmetric=symmetric, **observer)
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), load_file(made.path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert made.config["quantization_config"] == json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]


def test_rows_are_packed_in_blocks_without_changing_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source")
    params = {"num_bits": 3, "symmetric": False, "ignore": []}  # the head's 307 rows end within a word of zero points
    whole = load_file(quantize(source, tmp_path / "whole", **params).path / "model.safetensors")
    monkeypatch.setattr(packing, "BLOCK_WEIGHTS", 1)
    blocks = load_file(quantize(source, tmp_path / "blocks", **params).path / "model.safetensors")
    assert len(packing.row_blocks(307, 64)) == 10
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_the_config_is_the_sources_own_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    made = quantize(source, tmp_path / "out")
    config = made.config
    config.pop("quantization_config")
    assert config == DenseCheckpoint(source).config
    assert (made.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_group_of_zeros_stays_zero(tmp_path: Path) -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    weight[:, :32] = 0
    form = RTN.from_dict({"group_size": 32, "symmetric": False}).params.format
    packed = packing.pack_weight(weight, form, *packing.min_max_parameters(weight, form))
    assert not packing.unpack_weight(packed, form, torch.bfloat16)[:, :32].any()


def test_tied_embeddings_are_named_in_the_config_so_that_no_reader_expects_a_packed_head(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    assert quantize(source, tmp_path / "a", ignore=[]).config["quantization_config"]["ignore"] == ["lm_head"]
    assert quantize(source, tmp_path / "b", ignore=["re:lm_.*"]).config["quantization_config"]["ignore"] == ["re:lm_.*"]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"group_size": 64}, r"group_size: 64 does not divide the columns of model\.layers\.\*\.mlp\.down_proj \(96\); 32 divides"),
        ({"ignore": ["lm_heat"]}, r"ignore: 'lm_heat' matches no Linear layer; did you mean 'lm_head'\?"),
        ({"ignore": ["model.embed_tokens"]}, "ignore: 'model.embed_tokens' matches no Linear layer"),
        ({"ignore": ["re:.*router"]}, r"ignore: 're:\.\*router' matches no Linear layer$"),
        ({"ignore": ["re:.*"]}, "ignore leaves no Linear layer to quantize"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_weight_is_read(tmp_path: Path, params: dict, sentence: str) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    with pytest.raises(ValueError, match=sentence):
        RTN.from_dict({"group_size": 32, **params}).infer(spec)


def test_the_plan_says_which_widths_vllm_does_not_serve(tmp_path: Path) -> None:
    spec = DenseCheckpoint(make_checkpoint(tmp_path / "source")).model_spec
    assert "vLLM" in RTN.from_dict({"num_bits": 3}).explain(spec)[0]
    assert RTN.from_dict({"num_bits": 4}).explain(spec) == []


def test_memory_grows_with_the_largest_weight_and_not_with_the_model(tmp_path: Path) -> None:
    few, many = (DenseCheckpoint(make_checkpoint(tmp_path / str(n), num_hidden_layers=n)).model_spec for n in (1, 6))
    stage, target = RTN.from_dict({"group_size": 32}), Target(name="any")
    assert stage.memory(few, target).ram == stage.memory(many, target).ram
    assert stage.memory(many, target).totals["disk"] == stage.infer(many).nbytes
