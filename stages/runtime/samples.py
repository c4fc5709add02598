"""Text and conversations as training samples: which are taken, their labels, and how several become a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.artifact import Checkpoint, Dataset
from pipeline.stage import Context
from stages.runtime.chat import LossOn, encode_conversation
from stages.runtime.text import calibration_windows, load_tokenizer

NOT_COUNTED = -100  # as in every loss of transformers

Sample = dict[str, torch.Tensor]


class Samples(torch.utils.data.Dataset[Sample]):
    """Samples of a training, each {"input_ids": [length] int64, "labels": [length] int64}, in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def training_samples(ctx: Context, model: Checkpoint, data: Dataset, num_samples: int, max_length: int, loss_on: LossOn) -> Samples:
    """`num_samples` windows of a text (`window_samples`), or conversations, as the model's tokenizer reads them.

    Conversations are taken evenly spaced from those with something to learn in their first `max_length` tokens; what is left out or
    cut off is noted. ValueError: too few, no chat template, a conversation whose answers cannot be told from the rest, or token ids
    that the model does not have.
    """
    tokenizer, vocab_size = load_tokenizer(model.path), model.model_spec.architecture.vocab_size
    if not data.is_chat:
        return window_samples(calibration_windows(data, tokenizer, num_samples, max_length), tokenizer, vocab_size)
    if tokenizer.chat_template is None:
        raise ValueError(
            "train: the model has no chat template, so conversations cannot be written as it reads them; "
            "put its chat_template.jinja beside its tokenizer, or train on format: text"
        )
    encoded = [encode_conversation(name, messages, tokenizer, loss_on) for name, messages in data.conversations()]
    usable = [(ids, counted) for ids, counted in encoded if any(counted[1:max_length])]  # the first token is nobody's target
    if len(usable) < num_samples:
        raise ValueError(
            f"num_samples: {data.path.name} holds {len(usable)} conversations with something to learn in their first {max_length} "
            f"tokens, {num_samples} were asked for; lower num_samples, raise max_length, or give more conversations"
        )
    chosen = [usable[index * len(usable) // num_samples] for index in range(num_samples)]
    if len(usable) < len(encoded):
        ctx.note(
            f"{len(encoded) - len(usable)} of {len(encoded)} conversations have nothing to learn in their first {max_length} tokens "
            "and were left out; raise max_length to use them"
        )
    cut = sum(len(ids) > max_length for ids, _ in chosen)
    if cut:
        ctx.note(f"{cut} of {num_samples} conversations are longer than {max_length} tokens; their end was not learned")
    check_vocabulary(max(max(ids[:max_length]) for ids, _ in chosen), vocab_size)
    return Samples([as_sample(ids[:max_length], counted[:max_length]) for ids, counted in chosen])


def window_samples(windows: torch.Tensor, tokenizer: Any, vocab_size: int) -> Samples:
    """Of windows of a text [samples, length]: every token is learned but the first and the mark that the tokenizer begins documents with.

    Within a window that mark follows the end of a document, where the model must not learn to write it: nothing that generates text
    stops there. Where a tokenizer has one mark for both ends, it is learned. ValueError as of `check_vocabulary`.
    """
    check_vocabulary(int(windows.max()), vocab_size)
    begin = tokenizer.bos_token_id
    if begin is None or begin == tokenizer.eos_token_id:
        return Samples([as_sample(ids) for ids in windows])
    return Samples([as_sample(ids, ids != begin) for ids in windows])


def check_vocabulary(largest: int, vocab_size: int, model: str = "model") -> None:
    """ValueError where the largest token id of a text has no embedding; `model` is what the sentence calls it."""
    if largest >= vocab_size:
        raise ValueError(
            f"inputs.train: it encodes to token id {largest}, but the {model} has a vocabulary of {vocab_size:,}; "
            "the tokenizer in its folder is another model's, or has got tokens that the model was never given"
        )


def as_sample(ids: Sequence[int] | torch.Tensor, counted: Sequence[bool] | torch.Tensor | None = None) -> Sample:
    """Tokens and their labels: labels[t] is the token after position t, -100 where that is not counted or not there."""
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    labels = torch.full_like(tokens, NOT_COUNTED)
    labels[:-1] = tokens[1:]
    if counted is not None:
        labels[:-1].masked_fill_(~torch.as_tensor(counted[1:], dtype=torch.bool), NOT_COUNTED)
    return {"input_ids": tokens, "labels": labels}


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch, padded on the right: {"input_ids", "labels", "attention_mask"}, each [samples, longest] int64."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), longest, dtype=torch.int64),
        "labels": torch.full((len(samples), longest), NOT_COUNTED, dtype=torch.int64),
        "attention_mask": torch.zeros(len(samples), longest, dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length] = sample["input_ids"]
        batch["labels"][row, :length] = sample["labels"]
        batch["attention_mask"][row, :length] = 1
    return batch
