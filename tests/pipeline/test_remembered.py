"""What is remembered is right or it is nothing."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.remembered import MOST, SETTLED, Remembered, cache_folder, is_settled, stamp

MARK = ["file", [1, 2, 3, 4]]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Remembered("things")


def test_an_answer_is_recalled_for_its_mark_alone(memory: Remembered) -> None:
    assert memory.recall("a", MARK) is None
    memory.keep("a", MARK, {"answer": [1, None, "x"]})
    assert memory.recall("a", MARK) == {"answer": [1, None, "x"]}
    assert memory.recall("a", ["file", (1, 2, 3, 4)]) == {"answer": [1, None, "x"]}, "a tuple is a list to JSON"
    assert memory.recall("a", ["file", [1, 2, 3, 5]]) is None and memory.recall("b", MARK) is None
    memory.keep("a", ["other"], 2)
    assert memory.recall("a", MARK) is None and memory.recall("a", ["other"]) == 2


def test_the_folder_is_the_one_that_programs_may_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llmpress"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for no_absolute_path in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", no_absolute_path)
        assert cache_folder() == tmp_path / "home" / ".cache" / "llmpress"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "\x00", "[" * 100_000, "{}", '{"form": 0}', '{"form": 1, "entries": []}', '{"form": 1, "entries": {"a": 1}}',
     '{"form": 1, "entries": {"a": ["[1, 2]", 0]}}', '{"form": 1, "entries": {"a": [5, 5]}}', '{"form": 1, "entries": {"a": [1, 2, 3]}}'],
)  # fmt: skip
def test_a_damaged_file_is_as_none_and_is_written_anew(memory: Remembered, content: str) -> None:
    memory.keep("a", MARK, "right")
    (cache_folder() / "things.json").write_text(content)
    assert memory.recall("a", MARK) is None
    memory.keep("a", MARK, "again")
    assert memory.recall("a", MARK) == "again"


def test_one_changed_letter_is_noticed(memory: Remembered) -> None:
    memory.keep("a", MARK, "right")
    file = cache_folder() / "things.json"
    file.write_text(file.read_text().replace("right", "wrong"))
    assert memory.recall("a", MARK) is None


@pytest.mark.parametrize("place", ["file/llmpress", "things.json/x"])
def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / place.partition("/")[0]).write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    memory = Remembered("things")
    memory.keep("a", MARK, 1)
    assert memory.recall("a", MARK) is None


def test_the_oldest_answers_are_forgotten(memory: Remembered) -> None:
    for number in range(MOST + 2):
        memory.keep(str(number), MARK, number)
    assert memory.recall("1", MARK) is None and memory.recall("2", MARK) == 2
    assert len(json.loads((cache_folder() / "things.json").read_text())["entries"]) == MOST


def test_processes_that_write_at_once_leave_one_whole_file(memory: Remembered) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: memory.keep(str(number), MARK, number), range(200)))
    assert any(memory.recall(str(number), MARK) == number for number in range(200))
    assert [file.name for file in cache_folder().iterdir()] == ["things.json"]


def test_a_stamp_tells_files_apart_whatever_their_times_say(tmp_path: Path) -> None:
    file, other = tmp_path / "one", tmp_path / "two"
    file.write_text("one")
    before = stamp(file)
    assert not is_settled(before), "within one tick of the clock it could be changed without a new stamp"
    assert is_settled((0, 0, time.time_ns() - 2 * SETTLED, 0))
    other.write_text("two")
    os.utime(other, ns=(0, before[1]))
    other.replace(file)
    assert stamp(file) != before and stamp(file)[:2] == before[:2]
