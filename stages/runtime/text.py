"""Documents to token ids, the same way for every stage: whole documents in file order, each led by what the tokenizer adds."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.artifact import Dataset

BATCH_DOCUMENTS = 16  # at once: the tokenizer keeps offsets and more of each token, 50 bytes for one of text


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as transformers' PreTrainedTokenizerFast; code in the folder is never run."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.model_max_length = 10**9  # windows are cut here; the tokenizer's own warning would only mislead
    return tokenizer


def encode_documents(dataset: Dataset, tokenizer: Any) -> list[tuple[str, str, list[int]]]:
    """(id, text, token ids) of each document that has at least two tokens, in file order."""
    documents, encoded = list(dataset.documents()), []
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        encoded += tokenizer([text for _, text in documents[first : first + BATCH_DOCUMENTS]])["input_ids"]
    return [(name, text, ids) for (name, text), ids in zip(documents, encoded, strict=True) if len(ids) > 1]


def calibration_windows(dataset: Dataset, tokenizer: Any, samples: int, length: int) -> torch.Tensor:
    """[samples, length] int64: documents joined, cut into windows, `samples` of them evenly spaced over the text.

    ValueError where the text has fewer windows than asked for: nothing is repeated or padded.
    """
    ids = [token for _, _, tokens in encode_documents(dataset, tokenizer) for token in tokens]
    available = len(ids) // length
    if available < samples:
        raise ValueError(
            f"{dataset.path.name} holds {available} windows of {length} tokens, {samples} were asked for; "
            "lower num_samples or max_length, or give more text"
        )
    windows = torch.tensor(ids[: available * length], dtype=torch.int64).view(available, length)
    return windows[torch.arange(samples) * available // samples]
