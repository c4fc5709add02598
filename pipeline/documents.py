"""The files a dataset's split may be, read sample by sample: every line or row that is none is named.

jsonl, text         {"text": "...", "id": "..."} a line, `id` optional
jsonl, messages     {"messages": [{"role": "user", "content": "..."}, ...]} a line, `id` optional
parquet             the same as columns: `text` or `messages`, and `id` where there is one
txt                 documents with `<|endoftext|>` between them

Whatever has no id is called by the number of its line, row or place. In memory is one document at a time, of a parquet file a batch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

Message = dict[str, str]
Row = tuple[str, str, dict[str, Any]]  # where it stands, its id, its content: an empty one where it is no JSON object

END_OF_DOCUMENT = "<|endoftext|>"
BATCH_ROWS = 256  # of a parquet file, decoded at once


def read_documents(file: Path, file_format: str) -> Iterator[tuple[str, str]]:
    """Yield (id, text). ValueError names the line that is no document, or the file that is no text."""
    try:
        yield from _paragraphs(file) if file_format == "txt" else _texts(file, file_format)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def read_conversations(file: Path, file_format: str = "jsonl") -> Iterator[tuple[str, list[Message]]]:
    """Yield (id, messages), each with exactly a role and a content. ValueError names the line that is no conversation."""
    try:
        for place, name, row in _rows(file, file_format, "messages"):
            messages = row.get("messages")
            if not is_conversation(messages):
                raise ValueError(f'{file} {place} has no "messages": a list of objects whose "role" and "content" are strings')
            yield name, [{"role": m["role"], "content": m["content"]} for m in messages]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def is_conversation(messages: Any) -> TypeGuard[list[Message]]:
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(field), str) for field in ("role", "content"))


def _texts(file: Path, file_format: str) -> Iterator[tuple[str, str]]:
    for place, name, row in _rows(file, file_format, "text"):
        if not isinstance(row.get("text"), str):
            told = 'is not a JSON object with a "text" that is a string' if file_format == "jsonl" else 'has no "text" that is a string'
            raise ValueError(f"{file} {place} {told}")
        yield name, row["text"]


def _rows(file: Path, file_format: str, column: str) -> Iterator[Row]:
    return _parquet_rows(file, column) if file_format == "parquet" else _lines(file)


def _lines(file: Path) -> Iterator[Row]:
    """Each line that is not blank."""
    with open(file, encoding="utf-8-sig") as stream:  # -sig: without the mark that some editors put first
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                row = found if isinstance(found, dict) else {}
                yield f"line {number}", str(row.get("id", number)), row


def _parquet_rows(file: Path, column: str) -> Iterator[Row]:
    """Each row, of which only `column` and `id` are read. ValueError: no parquet file, or one without that column."""
    from pyarrow import ArrowException, parquet  # half a second, and only parquet files need it

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise ValueError(
                    f"{file} has no column `{column}` but {', '.join(names) or 'none'}; rename the one that holds the {column}"
                )
            number = 0
            for batch in table.iter_batches(BATCH_ROWS, columns=[name for name in (column, "id") if name in names], use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", str(number if row.get("id") is None else row["id"]), row
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the system's: no such file, no permission
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is not a parquet file that can be read ({reason}); write it again") from None


def _paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    """The mark holds no line break, so that it is found line by line."""
    number, parts = 1, list[str]()
    with open(file, encoding="utf-8-sig") as stream:
        for line in stream:
            first, *others = line.split(END_OF_DOCUMENT)
            parts.append(first)
            for other in others:
                if text := "".join(parts).strip():
                    yield str(number), text
                number, parts = number + 1, [other]
    if text := "".join(parts).strip():
        yield str(number), text
