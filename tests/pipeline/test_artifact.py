"""Documents as any editor writes them, and the tokenizer's digest; what is damaged is named by file and line."""

import json
from pathlib import Path

import pytest

from pipeline.artifact import Checkpoint, Dataset, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec
from pipeline.headers import CheckpointFileError
from tests.stages.models import save_tokenizer

LINES = '{"text": "one", "id": "a"}\n{"text": "two"}\n'


def dataset(file: Path, content: str | bytes) -> Dataset:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Dataset(file)


def test_jsonl_documents_have_ids_or_line_numbers(tmp_path: Path) -> None:
    assert list(dataset(tmp_path / "d.jsonl", LINES).documents()) == [("a", "one"), ("2", "two")]


def test_blank_lines_a_byte_order_mark_and_crlf_are_tolerated(tmp_path: Path) -> None:
    lines = dataset(tmp_path / "d.jsonl", "\ufeff\r\n" + LINES.replace("\n", "\r\n\r\n"))
    assert list(lines.documents()) == [("a", "one"), ("4", "two")]
    assert list(dataset(tmp_path / "d.txt", "\ufeffone<|endoftext|> \n<|endoftext|>two").documents()) == [("1", "one"), ("3", "two")]


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "5", "{", '"text"', '{"text": null}', '{"text": 5}', '{"text": ["a"]}', '{"text": "cut', "[" * 100_000]
)
def test_the_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r'd\.jsonl line 4 is not a JSON object with a "text" that is a string'):
        list(dataset(tmp_path / "d.jsonl", LINES + "\n" + line).documents())


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text$"):
        list(dataset(tmp_path / name, b'{"text": "\xff\xfe"}').documents())


def test_the_spec_says_how_a_file_is_parsed_whatever_it_is_called(tmp_path: Path) -> None:
    file = dataset(tmp_path / "blob", LINES).path
    spec = DatasetSpec(split="eval", file_format="jsonl", digest="00", nbytes=1)
    assert [text for _, text in Dataset(file, spec).documents()] == ["one", "two"]
    assert len(list(Dataset(file, spec.model_copy(update={"file_format": "txt"})).documents())) == 1


def test_the_tokenizer_s_digest_is_not_over_its_formatting(tmp_path: Path) -> None:
    assert tokenizer_digest(tmp_path) is None
    save_tokenizer(tmp_path, 300)
    file, first = tmp_path / "tokenizer.json", tokenizer_digest(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=7))
    assert tokenizer_digest(tmp_path) == first
    content["added_tokens"] = []
    file.write_text(json.dumps(content))
    assert tokenizer_digest(tmp_path) != first


@pytest.mark.parametrize("content", ["", '{"model": {"vo', "[1]", "[" * 100_000])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: str) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointFileError, match=r"tokenizer\.json is not .*; copy it again"):
        tokenizer_digest(tmp_path)
    with pytest.raises(CheckpointFileError, match=r"config\.json is not .*; copy it again"):
        _ = Checkpoint(tmp_path).config
