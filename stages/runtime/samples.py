"""Text and conversations as training samples: which are taken, their labels, and how several become a batch."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.artifact import Dataset
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


def training_samples(ctx: Context, model: Path, data: Dataset, num_samples: int, max_length: int, loss_on: LossOn) -> Samples:
    """`num_samples` windows of a text, in which every token is learned, or conversations, as the tokenizer in `model` reads them.

    Conversations are taken evenly spaced from those with something to learn in their first `max_length` tokens; what is left out or
    cut off is noted. ValueError: too few, no chat template, or a conversation whose answers cannot be told from the rest.
    """
    tokenizer = load_tokenizer(model)
    if not data.is_chat:
        return Samples([as_sample(window) for window in calibration_windows(data, tokenizer, num_samples, max_length)])
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
    return Samples([as_sample(ids[:max_length], counted[:max_length]) for ids, counted in chosen])


def as_sample(ids: Sequence[int] | torch.Tensor, counted: Sequence[bool] | None = None) -> Sample:
    """Tokens and their labels: labels[t] is the token after position t, -100 where that is not counted or not there."""
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    labels = torch.full_like(tokens, NOT_COUNTED)
    labels[:-1] = tokens[1:]
    if counted is not None:
        labels[:-1].masked_fill_(~torch.tensor(counted[1:], dtype=torch.bool), NOT_COUNTED)
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
