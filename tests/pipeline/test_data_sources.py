"""Splits from other places than a text file: parquet files, the hub's datasets, folders of evaluation tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from pipeline import documents
from pipeline.artifact import Dataset, sha256_file
from pipeline.artifact_spec import DatasetSpec
from pipeline.documents import read_conversations, read_documents
from pipeline.errors import RecipeError
from pipeline.identity import DigestMemo, data_key
from pipeline.recipe import DataSource, SplitSource
from pipeline.source import check_disjoint, open_split
from tests.pipeline.hub_server import COMMIT, serving

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def open_data(tmp_path: Path, split: Any, *, execute: bool = False) -> Dataset:
    source = DataSource.model_validate({"splits": {"train": split}})
    return open_split(source, "train", Path(), DigestMemo(tmp_path / "digests.json"), execute=execute)


def spec(dataset: Dataset) -> DatasetSpec:
    assert isinstance(dataset.spec, DatasetSpec)
    return dataset.spec


def write_parquet(file: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), file)
    return file


def test_a_parquet_file_is_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH_ROWS", 2)
    file = write_parquet(tmp_path / "a.parquet", text=["one", "two", "drei", "", "f\u00fcnf"], url=["x"] * 5)
    data = open_data(tmp_path, str(file))
    assert list(data.documents()) == [("1", "one"), ("2", "two"), ("3", "drei"), ("4", ""), ("5", "f\u00fcnf")]
    assert data.key == data_key("text", "parquet", sha256_file(file)) and spec(data).documents == 5
    named = write_parquet(tmp_path / "b.parquet", id=[7, None], text=["one", "two"])
    assert list(read_documents(named, "parquet")) == [("7", "one"), ("2", "two")]


def test_conversations_of_a_parquet_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "chats.parquet", messages=[CHAT, [{**CHAT[0], "extra": "1"}]])
    data = open_data(tmp_path, {"path": str(file), "format": "messages"})
    assert data.is_chat and list(data.conversations()) == [("1", CHAT), ("2", CHAT[:1])]
    bad = write_parquet(tmp_path / "bad.parquet", messages=[CHAT, []])
    with pytest.raises(ValueError, match=r'bad\.parquet row 2 has no "messages": a list of objects'):
        list(read_conversations(bad, "parquet"))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"content": ["one"], "url": ["x"]}, r"a\.parquet has no column `text` but content, url; rename the one that holds the text$"),
        ({"text": ["one", None]}, r'a\.parquet row 2 has no "text" that is a string$'),
        ({"text": [b"\xff\xfe"]}, r'a\.parquet row 1 has no "text" that is a string$'),
        ({"text": pyarrow.array([], pyarrow.string())}, r"a\.parquet holds no document$"),
    ],
)
def test_a_parquet_file_without_texts_is_one_sentence(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(RecipeError, match=r"^data\.splits\.train: .*" + told):
        open_data(tmp_path, str(file))


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=["some text that is long enough"] * 1000)
    whole = file.read_bytes()
    for content in (b"", b"PAR1 of nothing at all", whole[:-20], whole[:30] + bytes(60) + whole[90:]):
        file.write_bytes(content)
        with pytest.raises(RecipeError, match=r"^data\.splits\.train: .*a\.parquet is not a parquet file that can be read \(.*") as caught:
            open_data(tmp_path, str(file))
        assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(RecipeError, match=r"a\.parquet does not exist$"):
        open_data(tmp_path, str(file))


def test_a_text_file_is_read_document_by_document_and_each_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n1<|endoftext|>  <|endoftext|> two<|endoftext|>three\r\nof\n\n<|endoftext|>\n<|endoftext|>six")
    assert list(read_documents(tmp_path / "a.txt", "txt")) == [("1", "one\n1"), ("3", "two"), ("4", "three\nof"), ("6", "six")]


def test_only_parquet_and_the_hub_need_their_libraries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.identity import DigestMemo\nfrom pipeline.recipe import DataSource\n"
        "from pipeline.source import open_split\n"
        "open_split(DataSource(splits={'a': sys.argv[1]}), 'a', Path(), DigestMemo(Path('memo')), execute=True)\n"
        "print(sorted({'pyarrow', 'numpy', 'datasets', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ROWS = [{"text": "one", "chat": CHAT, "n": 1}, {"text": "zwei \u00e4", "chat": CHAT[:1], "n": 2}]
CARD = b'---\n{"dataset_info": {"splits": [{"name": "train", "num_bytes": 12345, "num_examples": 2}]}}\n---\n'
HUB_SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.errors import RecipeError
from pipeline.identity import DigestMemo
from pipeline.recipe import DataSource
from pipeline.source import open_split
for line in sys.stdin:
    source, execute = json.loads(line)
    data = DataSource.model_validate({"splits": {"train": source}})
    try:
        found = open_split(data, "train", Path(), DigestMemo(Path("outputs/digests.json")), execute=execute)
        content = list(found.conversations() if found.is_chat else found.documents()) if found.key else None
        print("ANSWER", json.dumps([found.key, str(found.path), found.spec.model_dump(), content]))
    except RecipeError as error:
        print("ANSWER", json.dumps(str(error)))
"""


def ask(folder: Path, url: str, *questions: tuple[dict[str, Any], bool]) -> list[Any]:
    """Each split opened with the hub's own clients, in a process of its own: they read their environment once."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT],
        input="".join(json.dumps(question) + "\n" for question in questions),
        env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


def test_a_hub_dataset_is_fetched_once_at_its_commit(tmp_path: Path) -> None:
    files = {"README.md": CARD, "data/train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}
    plain, chats, sliced = {"hub": "org/tiny"}, {"hub": "org/tiny", "format": "messages", "column": "chat"}, {"split": "train[:1]"}
    with serving("org/tiny", files) as url:
        pending, run, again, talk, first, column, split, config, absent = ask(
            tmp_path, url, (plain, False), (plain, True), (plain, False), (chats, True), ({**plain, **sliced}, True),
            ({**plain, "column": "n"}, True), ({**plain, "split": "test"}, True), ({**plain, "config": "de"}, True),
            ({"hub": "org/absent"}, False),
        )  # fmt: skip
    assert pending[:2] == ["", "."] and pending[3] is None
    assert pending[2]["nbytes"] == 12345 and pending[2]["digest"] == ""  # as its card says
    assert pending[2]["origin"] == f"org/tiny, split train, column text, commit {COMMIT}"
    key, path, content = run[0], Path(run[1]), run[3]
    assert content == [["1", "one"], ["2", "zwei \u00e4"]] and path.parent.parent == Path("outputs/datasets")
    assert key == data_key("text", "jsonl", sha256_file(tmp_path / path)) and run[2]["documents"] == 2
    assert again == run
    assert talk[2]["format"] == "messages" and talk[3] == [["1", CHAT], ["2", CHAT[:1]]]
    assert first[3] == [["1", "one"]] and first[0] != key

    told = (
        "data.splits.train.hub: split 'test' of 'org/tiny' at revision 'main' cannot be had from the hub (Unknown split \"test\". Should be"
    )
    assert column.startswith("data.splits.train: row 1 of org/tiny has in its column `n` no text that is a string")
    assert split.startswith(told) and split.endswith("check the names and your access, or give data.splits.train.path=/file.jsonl")
    assert "'org/tiny' (de) at revision" in config and "'de' not found" in config
    assert absent.startswith("data.splits.train.hub: split 'train' of 'org/absent' at revision 'main' cannot be had from the hub (")

    # the hub is gone: what was fetched is used, what was not is one sentence
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    kept, pinned, other, in_the_way = ask(
        tmp_path, url, (plain, True), ({**plain, "revision": COMMIT}, True), ({**plain, "revision": "v2"}, False), (plain, True)
    )
    assert kept == pinned == in_the_way == run
    assert other.startswith("data.splits.train.hub: split 'train' of 'org/tiny' at revision 'v2' cannot be had from the hub (")
    assert len(list((tmp_path / "outputs" / "datasets").iterdir())) == 3  # and nothing half written


def test_a_folder_in_the_hub_s_place_is_not_read_for_it(tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "tiny" / "train.jsonl").write_text('{"text": "not the hub\'s"}\n')
    with serving("org/tiny", {"train.jsonl": b'{"text": "the hub\'s"}\n'}) as url:
        (told,) = ask(tmp_path, url, ({"hub": "org/tiny"}, True))
    assert told.startswith("data.splits.train: a file or folder `org/tiny` stands in this folder and would be read in the hub's place")


def test_what_is_not_here_yet_is_not_taken_for_equal() -> None:
    pending = Dataset(Path(), DatasetSpec(split="train", digest="", nbytes=1))
    check_disjoint({"train": pending, "calibration": pending})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "it is either a file or a hub dataset; write path: /file.jsonl or hub: org/name"),
        ({"path": "a.txt", "hub": "org/name"}, "it is either a file or a hub dataset"),
        ({"path": "a.txt", "column": "text", "split": "train"}, "split and column have an effect only with hub: org/name"),
        ({"hub": "org/name", "format": "tasks"}, "tasks are read from a folder; write path: /folder"),
    ],
)
def test_a_split_has_one_place(content: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        SplitSource.model_validate(content)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    (folder / "lines").mkdir(parents=True)
    (folder / "lines" / "next_line.yaml").write_text("include: base\ntask: next_line\ntag: [python]\nprocess_docs: !function code.run\n")
    (folder / "lines" / "base").write_text("dataset_path: json\n")
    (folder / "lines" / "items.jsonl").write_text('{"q": 1}\n')
    (folder / "all.yaml").write_text("group: small\ntask: [next_line]\n")
    return folder


def test_a_folder_of_tasks_is_known_by_its_files_and_names_its_tasks(tmp_path: Path, tasks: Path) -> None:
    def key() -> str:
        return open_data(tmp_path, {"path": str(tasks), "format": "tasks"}).key

    data = open_data(tmp_path, {"path": str(tasks), "format": "tasks"})
    assert spec(data).tasks == ("next_line", "python", "small") and spec(data).format == "tasks"
    assert spec(data).nbytes == sum(file.stat().st_size for file in tasks.rglob("*") if file.is_file())
    with pytest.raises(ValueError, match=r"^tasks holds evaluation tasks \(format: tasks\); plain text is needed here$"):
        data.documents()
    for ignored in ("lines/__pycache__/code.pyc", ".git/HEAD", ".DS_Store"):
        (tasks / ignored).parent.mkdir(exist_ok=True)
        (tasks / ignored).write_text("x")
    assert key() == data.key
    keys = {data.key}
    (tasks / "lines" / "items.jsonl").write_text('{"q": 2}\n')
    keys.add(key())
    (tasks / "lines" / "base").rename(tasks / "lines" / "other")
    keys.add(key())
    assert len(keys) == 3
    assert tasks.rename(tmp_path / "moved").exists()
    assert open_data(tmp_path, {"path": str(tmp_path / "moved"), "format": "tasks"}).key in keys


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"items.jsonl": "{}"}, r"there is no \.yaml file with a `task` in it; give a folder of lm-evaluation-harness tasks$"),
        ({"base.yaml": "dataset_path: json"}, r"there is no \.yaml file with a `task` in it"),
        ({"a.yaml": "task: [", "b.yaml": "task: b"}, r"a\.yaml is not YAML \(line 1\); mend it$"),
        ({"a.yaml": "task: x", "b.yaml": "task: x"}, r"a\.yaml and b\.yaml both define the task 'x'; rename or remove one$"),
    ],
)
def test_a_folder_without_tasks_is_one_sentence(tmp_path: Path, files: dict[str, str], told: str) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(RecipeError, match=r"^data\.splits\.train: .*" + told):
        open_data(tmp_path, {"path": str(folder), "format": "tasks"})


def test_tasks_are_read_from_a_folder_and_text_from_a_file(tmp_path: Path, tasks: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^data\.splits\.train: all\.yaml is not a folder; give the folder of lm-evaluation-harness tasks$"
    ):
        open_data(tmp_path, {"path": str(tasks / "all.yaml"), "format": "tasks"})
    with pytest.raises(RecipeError, match=r"^data\.splits\.train: tasks is not a \.jsonl, \.parquet or \.txt file$"):
        open_data(tmp_path, str(tasks))
    with pytest.raises(RecipeError, match=r"nowhere does not exist$"):
        open_data(tmp_path, {"path": str(tmp_path / "nowhere"), "format": "tasks"})
