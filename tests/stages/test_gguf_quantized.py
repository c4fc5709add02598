"""Exports as llama.cpp makes and runs them: every type as planned, logits as transformers computes them, token ids alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.artifact import DenseCheckpoint, Export
from pipeline.gguf_file import read_gguf
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.stage import Context
from stages.gguf import GGUF
from stages.runtime import gguf_tokenizer
from stages.runtime.gguf_mix import BASE, gguf_spec
from stages.runtime.gguf_names import gguf_name
from tests.stages.models import TEXT, make_checkpoint

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.extras

SMALL_MODEL = Path(__file__).parents[2] / "assets" / "small-llama"
QUANTIZED = [name for name in BASE if name != "F16"]
# What decides a type: rows of 256s, of 32s, of neither; layers (which get more bits); heads for each KV head; a head of its own; size 70B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama of 256s, tied": {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True},
    "llama of 256s, 11 layers": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 11},
    "llama, 8 heads to a KV head": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "llama of 32s": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 8},
    "llama, neither": {"hidden_size": 64, "intermediate_size": 80, "tie_word_embeddings": True},
    "as deep as a 70B": {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 80, "head_dim": 16},
    "as deep as a 65B": {
        "hidden_size": 256,
        "intermediate_size": 32,
        "num_hidden_layers": 80,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "mistral": {"model_type": "mistral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9},
    "qwen2 of 256s, odd vocabulary": {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "vocab_size": 331},
    "qwen3, heads wider than the model": {"model_type": "qwen3", "hidden_size": 128, "head_dim": 64, "intermediate_size": 512},
}
# What decides logits. Weights are in fp32, so that all that an F16 file loses is the rounding to 16 bits.
COMPUTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, each head its own KV": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama, biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama 3.1's rotary frequencies": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linearly scaled rotary frequencies": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"model_type": "mistral", "rms_norm_eps": 1e-3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip


def dense(folder: Path, **settings: Any) -> DenseCheckpoint:
    make_checkpoint(folder, **settings)
    return DenseCheckpoint(folder, DenseCheckpoint(folder).model_spec)


def export(model: DenseCheckpoint, folder: Path, form: str) -> Export:
    folder.mkdir()
    return GGUF.from_dict({"format": form}).run(Context(folder, lambda event: None), model)


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_stores_every_tensor_as_planned(shape: str, tmp_path: Path) -> None:
    model = dense(tmp_path / "model", **SHAPES[shape])
    for form in QUANTIZED:
        made = export(model, tmp_path / form, form)
        found = {name: tensor.type for name, tensor in read_gguf(made.file).tensors.items()}
        planned = gguf_spec(model.model_spec, form)  # type: ignore[arg-type]
        assert found == {gguf_name(name): kind for name, (kind, _) in planned.tensors().items()}
        assert read_gguf(made.file).tensor_bytes == planned.nbytes
        assert [file.name for file in made.path.glob("*.gguf")] == ["model.gguf"]


def logits_of(file: Path, ids: list[int], int8: bool = False) -> torch.Tensor:
    from stages.runtime.llama_cpp_engine import LlamaContext, LlamaModel

    with LlamaModel(file) as model, LlamaContext(model, len(ids), int8, threads=1) as context:
        return torch.cat([logits for _, logits in context.logits(ids)])


def kl(expected: torch.Tensor, logits: torch.Tensor) -> float:
    log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", COMPUTED)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    from stages.runtime.loading import load_model

    model = dense(tmp_path / "model", dtype=torch.float32, num_hidden_layers=2, **COMPUTED[name])
    ids = torch.randint(3, 300, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = load_model(model.path)(torch.tensor([ids])).logits[0]
    exact = kl(expected, logits_of(export(model, tmp_path / "F16", "F16").file, ids))
    rounded = kl(expected, logits_of(export(model, tmp_path / "Q8_0", "Q8_0").file, ids))
    shuffled = kl(expected, expected.roll(1, 0))
    assert exact < 1e-4 * shuffled and rounded < 1e-2 * shuffled and exact < rounded


def test_more_bits_are_nearer_to_the_source(tmp_path: Path) -> None:
    from stages.runtime.loading import load_model

    model = dense(tmp_path / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    ids = torch.randint(3, 300, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = load_model(model.path).float()(torch.tensor([ids])).logits[0]
    found = [kl(expected, logits_of(export(model, tmp_path / form, form).file, ids)) for form in BASE]
    assert found == sorted(found) and found[0] * 100 < found[-1]


def test_an_int8_cache_changes_logits_a_little(tmp_path: Path) -> None:
    made = export(dense(tmp_path / "model", head_dim=32), tmp_path / "made", "F16")
    ids = list(range(3, 131))
    plain, int8 = logits_of(made.file, ids), logits_of(made.file, ids, int8=True)
    assert 0 < kl(plain, int8) < 1e-2


def test_the_cache_of_the_checkpoint_becomes_llama_cpps(tmp_path: Path) -> None:
    model = dense(tmp_path / "model", head_dim=32)
    write_cache(model.path, CacheSettings(mode="per_token_head"))
    spec = model.model_spec.with_cache("per_token_head")
    made = export(DenseCheckpoint(model.path, spec), tmp_path / "made", "Q8_0")
    assert made.model_spec.kv_cache.mode == "q8_0" and not (made.path / "kv_cache.json").exists()
    assert made.model_spec.kv_cache.bytes_per_token == 2 * 3 * 2 * 34  # keys and values, layers, KV heads, a block of 32


def sentencepiece_like(folder: Path, *, by_normalizer: bool) -> None:
    """BPE over characters that falls back to bytes, as SentencePiece's is converted for Hugging Face."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if by_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, max_token_length=6)
    tokenizer.train_from_iterator([" ".join(TEXT)], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] < 3]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize("by_normalizer", [True, False])
def test_a_tokenizer_that_falls_back_to_bytes_reads_alike(by_normalizer: bool, tmp_path: Path) -> None:
    model = dense(tmp_path / "model", vocab_size=420)
    sentencepiece_like(model.path, by_normalizer=by_normalizer)
    notes: list[dict[str, Any]] = []
    (tmp_path / "made").mkdir()
    made = GGUF.from_dict({"format": "Q8_0"}).run(Context(tmp_path / "made", notes.append), model)
    assert read_gguf(made.file).metadata["tokenizer.ggml.model"] == "llama"
    assert any("alike" in note.get("text", "") for note in notes)


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of another pre-tokenizer is all it takes, and llama.cpp itself does not notice."""
    model = DenseCheckpoint(SMALL_MODEL, DenseCheckpoint(SMALL_MODEL).model_spec)
    monkeypatch.setitem(gguf_tokenizer.PRE_TOKENIZERS, ((gguf_tokenizer.LLAMA3,), False), "gpt-2")
    with pytest.raises(ValueError, match=r"llama\.cpp reads hard place \d+ as other tokens than transformers: from token \d+ on"):
        export(model, tmp_path / "made", "F16")
