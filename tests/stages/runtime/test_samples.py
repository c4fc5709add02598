"""Samples of a training: labels are the next tokens, what is not learned is said, nothing is repeated or padded to fill up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from pipeline.artifact import Checkpoint, Dataset
from pipeline.artifact_spec import DatasetSpec
from pipeline.spec import ModelSpec
from pipeline.stage import Context
from stages.runtime.samples import as_sample, collate, training_samples
from stages.runtime.text import calibration_windows, load_tokenizer
from tests.stages.models import DIMENSIONS, save_tokenizer, write_documents
from tests.stages.runtime.test_chat import CHATML


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "model", 307)
    (tmp_path / "model/chat_template.jinja").write_text(CHATML)
    return tmp_path / "model"


def chats(file: Path, *conversations: list[tuple[str, str]]) -> Dataset:
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in conversations]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(file, DatasetSpec(split="train", format="messages", file_format="jsonl", digest="0", nbytes=file.stat().st_size))


def make(
    model: Path, data: Dataset, num_samples: int, max_length: int, loss_on: Any = "assistant", vocab_size: int = 307
) -> tuple[Any, list[str]]:
    events: list[dict[str, Any]] = []
    checkpoint = Checkpoint(model, ModelSpec.from_config({"model_type": "llama", **DIMENSIONS, "vocab_size": vocab_size}))
    samples = training_samples(Context(model, events.append), checkpoint, data, num_samples, max_length, loss_on)
    return samples, [event["text"] for event in events]


def test_labels_are_the_tokens_that_follow() -> None:
    sample = as_sample([5, 6, 7, 8])
    assert sample["input_ids"].tolist() == [5, 6, 7, 8] and sample["labels"].tolist() == [6, 7, 8, -100]
    assert as_sample([5, 6, 7, 8], [True, True, False, True])["labels"].tolist() == [6, -100, 8, -100]


def test_a_batch_is_padded_on_the_right_where_nothing_counts() -> None:
    batch = collate([as_sample([5, 6]), as_sample([7, 8, 9])])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["labels"].tolist() == [[6, -100, -100], [8, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_text_becomes_the_windows_that_calibration_uses(model: Path, tmp_path: Path) -> None:
    data = Dataset(write_documents(tmp_path / "train.jsonl"))
    samples, notes = make(model, data, 6, 32)
    windows = calibration_windows(data, load_tokenizer(model), 6, 32)
    assert torch.equal(torch.stack([samples[i]["input_ids"] for i in range(len(samples))]), windows)
    assert all(samples[i]["labels"].ne(-100).sum() == 31 for i in range(6)) and not notes


def test_conversations_are_cut_and_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    short = [("user", "a"), ("assistant", "ok")]
    data = chats(tmp_path / "chats.jsonl", short, [("user", "a" * 99), ("assistant", "x")], [("user", "b"), ("assistant", "y" * 99)], short)
    samples, notes = make(model, data, 3, 64)
    assert [len(samples[i]["input_ids"]) < 64 for i in range(3)] == [True, False, True]
    assert notes == [
        "1 of 4 conversations have nothing to learn in their first 64 tokens and were left out; raise max_length to use them",
        "1 of 3 conversations are longer than 64 tokens; their end was not learned",
    ]
    with pytest.raises(ValueError, match=r"num_samples: chats.jsonl holds 3 conversations .* 4 were asked for"):
        make(model, data, 4, 64)
    samples, notes = make(model, data, 4, 64, "all")
    assert len(samples) == 4 and notes == ["2 of 4 conversations are longer than 64 tokens; their end was not learned"]


def test_chosen_conversations_are_spread_over_the_data(model: Path, tmp_path: Path) -> None:
    data = chats(tmp_path / "chats.jsonl", *([("user", str(i)), ("assistant", f"{i}!")] for i in range(9)))
    samples, _ = make(model, data, 3, 64)
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.decode(samples[i]["input_ids"]) for i in range(3)]
    assert ["0!" in texts[0], "3!" in texts[1], "6!" in texts[2]] == [True] * 3


def test_a_model_without_a_template_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="train: the model has no chat template"):
        make(model, chats(tmp_path / "chats.jsonl", [("user", "a"), ("assistant", "b")]), 1, 64)


@pytest.mark.parametrize("end", ["<|end|>", "<|begin|>"])
def test_a_mark_that_only_begins_documents_is_read_and_not_learned(model: Path, tmp_path: Path, end: str) -> None:
    """As Llama's; where it is the end mark too, it is what a document ends with."""
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": end})
    mark = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", mark)])
    tokenizer.save_pretrained(model)
    samples, _ = make(model, Dataset(write_documents(tmp_path / "train.jsonl")), 20, 32, vocab_size=400)
    inputs, labels = (torch.stack([samples[i][name] for i in range(20)]) for name in ("input_ids", "labels"))
    assert (inputs[:, 1:] == mark).any()
    learned = labels[:, :-1] != -100
    assert torch.equal(learned, inputs[:, 1:] != mark) if end == "<|end|>" else learned.all()


def test_tokens_that_the_model_does_not_have_are_refused(model: Path, tmp_path: Path) -> None:
    sentence = r"^inputs\.train: it encodes to token id \d+, but the model has a vocabulary of 200; the tokenizer in its folder"
    with pytest.raises(ValueError, match=sentence):
        make(model, Dataset(write_documents(tmp_path / "train.jsonl")), 6, 32, vocab_size=200)
    with pytest.raises(ValueError, match=sentence):
        make(model, chats(tmp_path / "chats.jsonl", [("user", "a"), ("assistant", "the dog")]), 1, 64, vocab_size=200)
