"""LoRA on an NF4 base: nothing disturbs it, its adapters are ordinary peft folders, and merging gives what peft would give."""

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.headers import CheckpointFileError, read_header
from pipeline.spec import ModelSpec
from pipeline.worker import peak_rss
from stages.runtime import lora
from stages.runtime.loading import load_model
from stages.runtime.lora import add_lora, load_nf4, merge_adapter, save_adapter
from stages.runtime.lora_settings import adapter_spec, nf4_bytes, target_groups
from tests.stages.models import make_checkpoint

IDS = torch.arange(3, 3 + 96).view(2, 48)


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec.from_config(json.loads((folder / "config.json").read_text()))


def adapted(folder: Path, rank: int = 4, compute_dtype: torch.dtype = torch.bfloat16, **options: Any) -> PeftModel:
    model = add_lora(load_nf4(folder, "cpu", compute_dtype, **options), rank, lora_alpha=8, lora_dropout=0.0, seed=1)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as if it had been trained
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: PeftModel) -> dict[str, torch.Tensor | None]:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_evaluation_before_training_changes_neither_gradients_nor_weights(tmp_path: Path, compute_dtype: torch.dtype) -> None:
    """On a CPU with AVX512-BF16 this is what bitsandbytes breaks, silently, unless every layer is told not to repack."""
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    untouched, evaluated = adapted(source, compute_dtype=compute_dtype), adapted(source, compute_dtype=compute_dtype)
    layers = [module for module in evaluated.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    packed = [module.weight.data.clone() for module in layers]
    assert len(layers) == 7 * 2
    evaluated.eval()
    with torch.no_grad():
        evaluated(IDS)
    assert all(torch.equal(module.weight.data, before) for module, before in zip(layers, packed, strict=True))
    expected, found = gradients(untouched), gradients(evaluated)
    assert len(found) == 2 * 7 * 2
    for name, gradient in found.items():
        assert gradient is not None and expected[name] is not None, name
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("double_quant", [True, False])
def test_only_decoder_linears_are_in_nf4_and_only_adapters_train(tmp_path: Path, double_quant: bool) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, attention_bias=True)
    model = adapted(source, double_quant=double_quant)
    packed = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert {name.split(".")[-2] for name in packed} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    base = model.get_base_model()
    assert type(base.lm_head) is torch.nn.Linear and base.lm_head.weight.dtype == torch.bfloat16
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained)
    assert sum(parameter.numel() for _, parameter in trained) == adapter_spec(spec_of(source), 4).num_parameters


@pytest.mark.parametrize(("double_quant", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32)])
def test_the_bytes_of_the_base_are_those_of_the_plan(tmp_path: Path, double_quant: bool, dtype: torch.dtype) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, attention_bias=True, tie_word_embeddings=True)
    model = load_nf4(source, "cpu", dtype, double_quant)
    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
    assert sum(tensor.nbytes for tensor in tensors) == nf4_bytes(spec_of(source), double_quant, dtype.itemsize)


def test_the_adapter_is_drawn_from_its_seed_alone(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=1)
    drawn = []
    for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = add_lora(load_nf4(source, "cpu", torch.bfloat16), 4, 8, 0.0, seed)
        assert torch.equal(torch.get_rng_state(), before)
        drawn.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_an_adapter_is_a_peft_folder_that_names_no_path(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    model = adapted(source)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "adapter/adapter_config.json").read_text()
    written = read_header(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(entry.nbytes for entry in written.values()) == adapter_spec(spec_of(source), 4).nbytes
    loaded = PeftModel.from_pretrained(load_nf4(source, "cpu", torch.bfloat16), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    save_adapter(model, tmp_path / "named", "meta-llama/Llama-3.1-8B")
    assert json.loads((tmp_path / "named/adapter_config.json").read_text())["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dtype": torch.float32},
        {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "shard_size": "60KB"},
        {"model_type": "qwen2", "dtype": torch.float16},
    ],
    ids=str,
)
def test_merging_equals_peft_on_the_original_weights(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "BLOCK_WEIGHTS", 1000)  # several blocks to a weight
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2, **config)
    save_adapter(adapted(source), tmp_path / "adapter")
    merge_adapter(source, tmp_path / "adapter", tmp_path / "merged")
    ours = load_model(tmp_path / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    changed = 0
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == config.get("dtype", torch.bfloat16)
        ulp = torch.finfo(tensor.dtype).eps * tensor.float().abs()
        assert ((ours[name].float() - tensor.float()).abs() <= ulp + 1e-7).all(), name
        changed += not torch.equal(ours[name], original[name])
    assert changed == 7 * 2
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_an_adapter_of_another_model_or_kind_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", num_hidden_layers=2)
    save_adapter(adapted(source), tmp_path / "adapter")
    with pytest.raises(ValueError, match="28 tensors, of which 14 fit"):
        merge_adapter(make_checkpoint(tmp_path / "shallow", num_hidden_layers=1), tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=r"an adapter for a weight \[64, 96\] does not fit one of \[64, 128\]"):
        merge_adapter(
            make_checkpoint(tmp_path / "wide", num_hidden_layers=2, intermediate_size=128), tmp_path / "adapter", tmp_path / "out"
        )
    assert not (tmp_path / "out/model.safetensors").exists()
    settings = tmp_path / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointFileError, match="no plain LoRA adapter"):
        merge_adapter(source, tmp_path / "adapter", tmp_path / "out")


def test_a_rank_that_a_weight_has_no_room_for_is_refused(tmp_path: Path) -> None:
    spec = spec_of(make_checkpoint(tmp_path / "source"))
    assert adapter_spec(spec, 32).rank == 32
    with pytest.raises(ValueError, match=r"rank: 33 is more than the smaller side of .*k_proj \[32, 64\]; write 32 or less"):
        adapter_spec(spec, 33)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_merging_holds_one_tensor(tmp_path: Path) -> None:
    """Of a model of 100 MB in matrices of 8 MiB it holds one, its float32 block and the adapter's pair."""
    source = make_checkpoint(tmp_path / "source", intermediate_size=1 << 16, num_hidden_layers=4, dtype=torch.float16)
    spec = spec_of(source)
    weights, generator = {}, torch.Generator().manual_seed(0)
    for group in target_groups(spec):
        for module in group.module_names:
            weights[f"{lora.PREFIX}{module}.lora_A.weight"] = torch.randn(2, group.shape[1], generator=generator)
            weights[f"{lora.PREFIX}{module}.lora_B.weight"] = torch.randn(group.shape[0], 2, generator=generator)
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / lora.ADAPTER_WEIGHTS)
    (tmp_path / "adapter" / lora.ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    del weights
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = peak_rss()
    merge_adapter(source, tmp_path / "adapter", tmp_path / "merged")
    assert spec.nbytes > 96 << 20
    assert peak_rss() - before < 40 << 20
