"""Text and conversations from files, each bad line named."""

import json
from pathlib import Path

import pytest

from pipeline.documents import read_conversations, read_documents


def chat(*pairs: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content, "extra": 1} for role, content in pairs]})


def test_conversations_are_roles_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(chat(("user", "Hi"), ("assistant", "Hello")) + "\n\n" + '{"id": "b", "messages": [{"role": "user", "content": ""}]}\n')
    assert list(read_conversations(file)) == [
        ("1", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]),
        ("b", [{"role": "user", "content": ""}]),
    ]


@pytest.mark.parametrize(
    "line",
    ["[]", "{", '{"text": "a"}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 1}]}'],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(chat(("user", "Hi")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r'line 2 has no "messages": a list of objects whose "role" and "content" are strings$'):
        list(read_conversations(file))


def test_documents_of_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two<|endoftext|>\n")
    assert list(read_documents(tmp_path / "a.txt", "txt")) == [("1", "one"), ("2", "two")]
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one", "id": 7}\n{"text": "two"}\n', encoding="utf-8")
    assert list(read_documents(tmp_path / "a.jsonl", "jsonl")) == [("7", "one"), ("2", "two")]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text$"):
        list(read_documents(tmp_path / name, name.partition(".")[2]))
