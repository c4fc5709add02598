"""The settings every training stage shares, and what they cost. Needs no torch: a plan reads it.

A sample is a window of text or a conversation. The samples of all epochs, each epoch in an order of its own, are one sequence
that is cut into global batches, each of them one update; only the very last may be smaller. What the samples of one update are
does not depend on the micro batch, which only bounds how many of them are computed at once.
"""

import math
from typing import Literal

from pydantic import Field

from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.layout import Frozen
from pipeline.spec import ModelSpec
from pipeline.stage import Stage

LOSS_CHUNK_BYTES, LOSS_CHUNK_TOKENS = 8 << 20, 256  # float32 logits of a chunk: as much as a CPU's cache holds, or so many tokens
FREED, FREED_WITH_LORA = 30, 75  # % of a micro batch's memory, measured with glibc; of LoRA's many small tensors 45 to 100
LOSS_BUFFERS = 6  # of such a chunk at the peak: student logits as they are and over T, both log-softmaxes, a softmax, 16-bit copies


class TrainingParams(Computing, Stage.Params):
    """Names as in transformers' TrainingArguments. A stage gives `learning_rate` its default. Trained weights and their optimizer are fp32,
    whatever `compute_dtype` says."""

    learning_rate: float = Field(gt=0)  # the highest, after warmup
    num_samples: int = Field(default=1024, ge=1)  # windows of text, evenly spaced over it, or conversations
    max_length: int = Field(default=512, ge=2)  # tokens in each
    epochs: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=16, ge=1)  # samples in one update
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"  # after warmup; linear and cosine end at 0
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)  # of all updates, rising from 0
    weight_decay: float = Field(default=0.0, ge=0)  # AdamW's; never of norms and biases
    max_grad_norm: float = Field(default=1.0, ge=0)  # longer gradients are scaled down to this norm; 0: never
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def steps(self) -> int:
        """Updates of the weights."""
        return math.ceil(self.num_samples * self.epochs / self.global_batch_size)

    @property
    def tokens(self) -> int:
        """At most: a conversation may be shorter than `max_length`."""
        return self.num_samples * self.max_length * self.epochs

    def check_data(self, train: DatasetSpec, model: ModelSpec) -> None:
        """ValueError for what is known to fail before anything is read: too few bytes, more tokens than positions, warmup to the end."""
        check_windows(self.num_samples, self.max_length, train, model)
        if math.ceil(self.warmup_ratio * self.steps) >= self.steps:  # the first update of a warmup has a learning rate of 0
            count = f"{self.steps} update{'s' if self.steps > 1 else ''}"
            raise ValueError(
                f"num_samples: {self.num_samples} samples make {count}, all of it warmup, so that hardly anything would be learned; "
                "give more samples, a smaller global_batch_size or warmup_ratio: 0"
            )


def check_windows(num_samples: int, max_length: int, train: DatasetSpec, model: ModelSpec) -> None:
    """ValueError where `num_samples` windows of `max_length` tokens cannot be cut from the text, or the model has fewer positions."""
    positions = model.architecture.max_position
    if max_length > positions:
        raise ValueError(f"max_length: {max_length} is more than the model's {positions} positions; write {positions} or less")
    needed = num_samples * max_length  # a token stands for at least one byte of the file
    if train.format == "text" and train.nbytes < needed:
        raise ValueError(
            f"num_samples: {num_samples} windows of {max_length} tokens need more text than the {train.nbytes:,} bytes of "
            f"{train.split}; write {train.nbytes // max_length} at the very most, a quarter of that for English, or give more text"
        )


class TrainingExecution(Stage.Execution):
    micro_batch_size: int = Field(default=8, ge=1)  # samples computed at once: splits the global batch, bounds the memory
    gradient_checkpointing: bool = False  # keep a layer's inputs only and compute it again: less memory, a third more time
    checkpoint_minutes: float = Field(default=10, ge=0)  # between saved states, to continue from; 0: each point of the curve
    device: Literal["auto", "cpu", "cuda"] = "auto"


class LoRAParams(Frozen):
    """Low-rank adapters beside frozen weights (Hu et al., 2021, https://arxiv.org/abs/2106.09685); names as in peft, whose r is `rank`."""

    rank: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)  # the adapter's product is scaled by lora_alpha / rank
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)


def loss_chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits exist at once. Measured on one core: at 4,096 words 512 tokens take a third of 4,096's time, as they stay
    in the cache; at 128,256 words fewer than 256 pay for adding to the embedding's gradient so often."""
    return max(LOSS_CHUNK_TOKENS, LOSS_CHUNK_BYTES // (4 * vocab_size))


def loss_bytes(model: ModelSpec) -> int:
    """Working memory of the loss: a chunk's logits of student and teacher, and what is computed from them."""
    return LOSS_BUFFERS * 4 * model.architecture.vocab_size * loss_chunk_tokens(model.architecture.vocab_size)


def activation_memory(
    params: TrainingParams, execution: TrainingExecution, model: ModelSpec, on_gpu: bool, lora: LoRAParams | None = None
) -> dict[str, int]:
    """What comes and goes with each micro batch, itemised; `lora` where adapters are trained and the rest is frozen in NF4."""
    hidden, tokens = model.architecture.hidden_size, min(execution.micro_batch_size, params.global_batch_size) * params.max_length
    layer = tokens * kept_bytes(params, model, lora)
    boundary = tokens * hidden * (params.item if lora else 4)  # between two layers; in float32 where the embedding is trained
    kept, computed = (boundary, layer) if execution.gradient_checkpointing else (layer, 0)
    held = {
        "activations of a micro batch": model.architecture.num_layers * kept + computed,
        "gradients of one layer's activations": layer,
        "hidden states at the loss, with their gradients": tokens * 32 * hidden,
        "logits of a chunk of tokens": loss_bytes(model),
    }
    if lora:
        held["one weight, dequantized"] = 2 * params.item * max(math.prod(group.shape) for group in model.linear_groups if group.layers)
    freed = FREED_WITH_LORA if lora and not on_gpu else FREED
    return held | {"freed blocks that the allocator keeps": sum(held.values()) * freed // 100}


def kept_bytes(params: TrainingParams, model: ModelSpec, lora: LoRAParams | None) -> int:
    """Of one token in one decoder layer, kept for the backward pass; counted from what autograd saves in transformers' models.

    A norm keeps its input in float32, and what it scales where its weight is trained; a LoRA pair keeps its own copy of its input.
    """
    a = model.architecture
    hidden, inner, queries, keys = a.hidden_size, a.intermediate_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    if params.computes_in == "bf16":
        kept = (18 * hidden + 6 * queries if lora else 26 * hidden + 4 * queries) + 4 * keys + 8 * inner
        head_norms = (4 if lora else 6) * (queries + keys)
        dropped = 20 * hidden + 4 * queries + 4 * inner
    else:
        kept = (16 if lora else 24) * hidden + 8 * queries + 8 * keys + 16 * inner
        head_norms = (4 if lora else 8) * (queries + keys)
        dropped = 32 * hidden + 8 * queries + 4 * inner
    if a.qk_norm:
        kept += head_norms
    if lora:
        kept += 7 * params.item * lora.rank + (dropped if lora.lora_dropout else 0)
    return kept + 4 * a.num_heads
