"""The files a dataset's split may be, read sample by sample: every line that is none is named.

jsonl, text       {"text": "...", "id": "..."} a line, `id` optional
jsonl, messages   {"messages": [{"role": "user", "content": "..."}, ...]} a line
txt               documents with `<|endoftext|>` between them
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, str]


def read_documents(file: Path, file_format: str) -> Iterator[tuple[str, str]]:
    """Yield (id, text). ValueError names the line that is no document, or the file that is no text."""
    try:
        yield from _texts(file) if file_format == "jsonl" else _paragraphs(file)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def read_conversations(file: Path) -> Iterator[tuple[str, list[Message]]]:
    """Yield (id, messages), each with exactly a role and a content. ValueError names the line that is no conversation."""
    try:
        for number, row in _rows(file):
            messages = row.get("messages")
            if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
                raise ValueError(f'{file} line {number} has no "messages": a list of objects whose "role" and "content" are strings')
            yield str(row.get("id", number)), [{"role": m["role"], "content": m["content"]} for m in messages]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    for number, row in _rows(file):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'{file} line {number} is not a JSON object with a "text" that is a string')
        yield str(row.get("id", number)), row["text"]


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; an empty object for one that is no JSON object."""
    with open(file, encoding="utf-8-sig") as stream:  # -sig: without the mark that some editors put first
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield number, row if isinstance(row, dict) else {}


def _paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(file.read_text(encoding="utf-8-sig").split("<|endoftext|>"), 1):
        if text.strip():
            yield str(number), text.strip()


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(field), str) for field in ("role", "content"))
