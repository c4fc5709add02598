"""Write a dense checkpoint as one GGUF file, tensor by tensor: the model is never in memory.

The header holds every name, shape and type, so that all of it is known from the spec before the first weight is read. Of the llama
architecture the rows of the query and key projections are reordered, since llama.cpp rotates neighbouring rows where Hugging Face rotates
the two halves of a head. Format: docs/gguf.md of ggml; metadata by the `gguf` package, which belongs to llama.cpp.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from pipeline.architecture import Architecture
from pipeline.artifact import DenseCheckpoint
from pipeline.spec import ModelSpec
from stages.runtime.gguf_mix import ROPE_FREQS
from stages.runtime.gguf_names import ARCHITECTURES, PERMUTED, gguf_name
from stages.runtime.gguf_tokenizer import tokenizer_kind, vocabulary
from stages.runtime.tensors import DTYPES, TensorReader
from stages.runtime.text import load_tokenizer

# numpy has no bf16:
NUMPY: dict[str, "np.dtype[Any]"] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type (enum llama_ftype)
RMS_EPS = 1e-6  # where a config.json does not say, as in transformers
THETA = 1e4


def write_gguf(model: DenseCheckpoint, spec: ModelSpec, file: Path, progress: Callable[[int, int], None]) -> None:
    """`spec` says what the file is to hold: matrices in F16, BF16 or F32. ValueError where a weight does not fit into F16, or the
    tokenizer cannot be written."""
    shape, config = spec.architecture, model.config
    writer = gguf.GGUFWriter(file, ARCHITECTURES[shape.model_type])
    table = spec.tensors()
    (kind,) = {group.format.ggml for group in spec.groups if group.kind != "norm"}
    assert kind is not None
    writer.add_file_type(FILE_TYPES[kind])
    add_architecture(writer, shape, config)
    add_tokenizer(writer, model.path, shape.vocab_size)
    for name, (stored, size) in table.items():
        dtype = NUMPY[stored]
        writer.add_tensor_info(gguf_name(name), size, dtype, math.prod(size) * dtype.itemsize, gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    reader = TensorReader(model.path)
    for done, (name, (stored, _)) in enumerate(table.items(), 1):
        writer.write_tensor_data(_content(reader, name, stored, shape, config))
        progress(done, len(table))
    writer.close()


def _content(reader: TensorReader, name: str, stored: str, shape: Architecture, config: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
    if name == f"{ROPE_FREQS}.weight":
        return rope_divisors(rope_settings(config), shape.head_dim).numpy()
    tensor = reader.read(name)
    if ARCHITECTURES[shape.model_type] in PERMUTED:
        if ".q_proj." in name:
            tensor = permuted(tensor, shape.num_heads)
        elif ".k_proj." in name:
            tensor = permuted(tensor, shape.num_kv_heads)
    converted = tensor.to(DTYPES[stored]).contiguous()
    if stored == "F16" and tensor.dtype != torch.float16 and not converted.isfinite().all():
        raise ValueError(f"format: {name} holds a weight beyond 65504, the largest of F16; write format: Q8_0")
    return (converted.view(torch.uint16) if stored == "BF16" else converted).numpy()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * head_dim, ...] with the rows of each head's halves, 0 1 2 | 3 4 5, interleaved: 0 3 1 4 2 5."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json: transformers 5's `rope_parameters`, or what it was called before."""
    return {"rope_theta": config.get("rope_theta", THETA), **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rope_divisors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32: what rope type llama3 divides each frequency by, 1 for short waves, `factor` for long ones
    (Llama 3.1: https://arxiv.org/abs/2407.21783; the formula as in transformers)."""
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    wavelength, original = 2 * math.pi / frequency, rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    long, short = wavelength > original / low, wavelength < original / high
    return torch.where(short, torch.ones_like(between), torch.where(long, torch.full_like(between, rope["factor"]), between))


def add_architecture(writer: Any, shape: Architecture, config: Mapping[str, Any]) -> None:
    """Sizes, norms and rotary frequencies."""
    rope = rope_settings(config)
    writer.add_context_length(context_length(shape, config))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", RMS_EPS))
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if shape.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(shape.vocab_size)


def context_length(shape: Architecture, config: Mapping[str, Any]) -> int:
    """Positions that llama.cpp may use. It attends to all of them, so that they end where a model that slides its window would let go."""
    sliding = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(shape.max_position, sliding or shape.max_position)


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """The folder's tokenizer as transformers loads it, its special tokens and its chat template. ValueError as of `tokenizer_kind`."""
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = tokenizer_kind(content)
    words = vocabulary(content, kind, size)
    writer.add_tokenizer_model(kind.model)
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if kind.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(kind.space_prefix)
    else:
        writer.add_token_merges(words.merges)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    bos, eos = added_around(tokenizer)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    if tokenizer.chat_template:
        templates = tokenizer.chat_template
        writer.add_chat_template(templates if isinstance(templates, str) else [{"name": n, "template": t} for n, t in templates.items()])


def added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos token before a text, and its eos token behind it. ValueError where it puts anything else."""
    inner, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    known = {
        (*head, *inner, *tail): (bool(head), bool(tail))
        for tail in ((), (tokenizer.eos_token_id,))
        for head in ((), (tokenizer.bos_token_id,))
        if None not in (*head, *tail)
    }
    if tuple(whole) not in known:
        raise ValueError("the tokenizer adds other tokens to a text than its bos and eos tokens, which llama.cpp cannot")
    return known[tuple(whole)]
