"""Small random checkpoints of every supported architecture, complete with a working tokenizer, for tests to compress."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stages.runtime.tensors import DTYPE_NAMES, CheckpointWriter

TEXT = (
    "A stage reads shapes and bytes, then it reads weights.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Pruning removes whole heads, neurons and layers; quantization rounds what is left.",
    "def perplexity(losses): return math.exp(sum(losses) / len(losses))",
)

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 307,  # odd, and prime: nothing may rely on a round vocabulary
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def make_checkpoint(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "1GB",
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Save a random model of `model_type` and its tokenizer in `folder`, and return it.

    Weights are drawn large enough that every head, neuron and layer matters to the logits; norms and biases too are
    random, so that forgetting one is seen.
    """
    config = AutoConfig.for_model(model_type, **(DIMENSIONS | config_overrides), dtype=dtype)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter, dtype=torch.float32))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter, dtype=torch.float32))
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder, config.vocab_size)
    return folder


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: int) -> Path:
    """Write the weights of a checkpoint, in their order, by llmpress's own writer."""
    with CheckpointWriter(folder, {name: (DTYPE_NAMES[t.dtype], t.shape) for name, t in tensors.items()}, **settings) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE trained on `TEXT`: any text encodes, no id reaches `vocab_size` (at least 257)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def write_documents(file: Path, count: int = 40) -> Path:
    """A `.jsonl` dataset of `count` short documents made of the sentences of `TEXT`."""
    rows = ({"id": f"doc{i}", "text": f"{i}. " + " ".join(TEXT[(i + j) % len(TEXT)] for j in range(3))} for i in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
