"""The settings every training stage shares, and what they cost. Needs no torch: a plan reads it.

A sample is a window of text or a conversation. The samples of all epochs, each epoch in an order of its own, are one sequence
that is cut into global batches, each of them one update; only the very last may be smaller. What the samples of one update are
does not depend on the micro batch, which only bounds how many of them are computed at once.
"""

import math
from typing import Literal

from pydantic import Field

from pipeline.artifact import DatasetSpec
from pipeline.layout import Frozen
from pipeline.spec import ModelSpec
from pipeline.stage import Stage

LOSS_CHUNK_BYTES, LOSS_CHUNK_TOKENS = 8 << 20, 256  # float32 logits of a chunk: as much as a CPU's cache holds, or so many tokens
LOSS_BUFFERS = 6  # of such a chunk at the peak: student logits as they are and over T, both log-softmaxes, a softmax, 16-bit copies


class TrainingParams(Stage.Params):
    """Names as in transformers' TrainingArguments. A stage gives `learning_rate` its default."""

    learning_rate: float = Field(gt=0)  # the highest, after warmup
    num_samples: int = Field(default=1024, ge=1)  # windows of text, evenly spaced over it, or conversations
    max_length: int = Field(default=512, ge=2)  # tokens in each
    epochs: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=16, ge=1)  # samples in one update
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"  # after warmup; linear and cosine end at 0
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)  # of all updates, rising from 0
    weight_decay: float = Field(default=0.0, ge=0)  # AdamW's; never of norms and biases
    max_grad_norm: float = Field(default=1.0, ge=0)  # longer gradients are scaled down to this norm; 0: never
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the computation; trained weights and their optimizer are always fp32
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
    checkpoint_minutes: float = Field(default=10, ge=0)  # between two saved states, from which an interrupted run continues; 0: each update
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


def activation_memory(params: TrainingParams, execution: TrainingExecution, model: ModelSpec) -> dict[str, int]:
    """What a micro batch leaves until its backward pass, itemised, with one layer's gradients of it.

    Per token and layer, measured for Llama under autocast: norms and residuals in float32, 30 bytes for each hidden element; four
    intermediate-sized and two head-sized tensors in the dtype of the computation.
    """
    a, item = model.architecture, 2 if params.dtype == "bf16" else 4
    layer = 30 * a.hidden_size + item * (4 * a.intermediate_size + 2 * (a.num_heads + a.num_kv_heads) * a.head_dim)
    kept = 4 * a.hidden_size if execution.gradient_checkpointing else layer
    tokens = min(execution.micro_batch_size, params.global_batch_size) * params.max_length
    layers = tokens * (a.num_layers * kept + 2 * layer)
    return {
        "activations of a micro batch": layers,
        "hidden states at the loss, with their gradients": tokens * 32 * a.hidden_size,
        "freed blocks that the allocator keeps": layers * 3 // 10,  # measured: a quarter to a third
    }
