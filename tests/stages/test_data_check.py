"""What an evaluation text shares with another text is counted exactly, and a text of another language or kind is pointed out."""

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import Dataset, EvalReport
from pipeline.artifact_spec import DataFormat, DatasetSpec
from pipeline.errors import InputProblems
from pipeline.stage import Context
from pipeline.target import Target
from stages.data_check import DataCheck
from stages.functional.word_ngrams import word_ids
from stages.runtime.domain import KEPT_PIECES, PIECE_BYTES, TextSample
from stages.runtime.overlap import Prints

ASSETS = Path(__file__).parents[2] / "assets" / "data"
TEXTS = Path(__file__).parent / "texts"  # written for these tests: two or three documents of a hundred words each
ENGLISH, MORE_ENGLISH, GERMAN = (
    [text for _, text in Dataset(TEXTS / f"{name}.txt").documents()] for name in ("english", "more_english", "german")
)
Write = Callable[..., Dataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(split: str, texts: Sequence[Any], form: DataFormat = "text") -> Dataset:
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps({"id": f"{split}-{i}", form: text}) + "\n" for i, text in enumerate(texts)))
        return opened(file, split, form)

    return write


def opened(file: Path, split: str, form: DataFormat = "text") -> Dataset:
    return Dataset(file, DatasetSpec(split=split, format=form, file_format="jsonl", digest=split, nbytes=file.stat().st_size))


def check(folder: Path, text: Dataset, other: Dataset, **params: Any) -> tuple[EvalReport, list[str]]:
    """The report and the notes."""
    events: list[dict[str, Any]] = []
    folder.mkdir(exist_ok=True)
    report = DataCheck.from_dict(params).run(Context(folder, events.append), text, other)
    return report, [event["text"] for event in events if event["event"] == "note"]


def words(seed: int, count: int, of: int = 40) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(of)}" for _ in range(count)]


def test_words_are_without_case_and_punctuation_and_each_character_where_none_is_between() -> None:
    assert np.array_equal(word_ids('"Paths", NOT _bytes_!\n'), word_ids("paths not   bytes"))
    assert len(word_ids("don't a_b 3.14")) == 6
    assert len(word_ids("港口 wakes 早")) == 4
    assert not np.array_equal(word_ids("a b"), word_ids("b a"))
    long = " ".join(words(0, 100_000, of=1000))
    assert np.array_equal(word_ids(long), np.concatenate([word_ids(word) for word in long.split()]))


@pytest.mark.parametrize("longer", ["eval", "other"])
def test_shared_ngrams_are_counted_as_sets_of_words_would_count_them(write: Write, tmp_path: Path, longer: str) -> None:
    """Whichever of the texts is the smaller, and so is kept in memory."""
    copied = words(1, 30)
    texts = [" ".join(words(seed, 60)) for seed in (2, 3)] + [" ".join([*words(4, 20), *copied, *words(5, 10)]), "w1 w2"]
    others = [" ".join([*copied, *words(6, 50)]), " ".join(words(7, 50)), "W1, w2!"]
    (texts if longer == "eval" else others).append(" ".join(f"x{i}" for i in range(3000)))
    n = 13

    def grams(text: str) -> list[tuple[str, ...]]:
        found = text.lower().replace(",", "").replace("!", "").split()
        return [tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))]

    there = {gram for text in others for gram in grams(text)}
    counts = [sum(gram in there for gram in grams(text)) for text in texts]
    report, _ = check(tmp_path / "out", write("eval", texts), write("train", others), max_overlap=None)

    total = sum(len(grams(text)) for text in texts)
    assert counts[2] == 18 and counts[3] == 1  # 30 words copied; two words, one n-gram of their own
    assert report.metrics["overlap_share"] == sum(counts) / total
    assert report.metrics["overlap_documents"] == 2 and report.metrics["ngrams"] == total
    assert report.metrics["identical_documents"] == 1 and report.metrics["documents"] == len(texts)
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["documents"]
    assert [row["shared"] for row in rows] == counts
    assert rows[3] == {"id": "eval-3", "ngrams": 1, "shared": 1, "identical": True}


def test_too_much_overlap_stops_the_run_and_names_the_documents(write: Write, tmp_path: Path) -> None:
    text, other = write("eval", ENGLISH), write("calibration", [*MORE_ENGLISH, ENGLISH[1].upper()])
    told = r"^max_overlap: 30 % of the 13-grams of eval also stand in calibration, most in eval-1, so that .*max_overlap: null"
    with pytest.raises(ValueError, match=told):
        check(tmp_path / "out", text, other)
    report, notes = check(tmp_path / "out", text, other, max_overlap=None)
    assert 0.25 < report.metrics["overlap_share"] < 0.4
    assert notes == ["1 document of eval also stands in calibration word for word: eval-1"]
    assert check(tmp_path / "out", text, other, max_overlap=0.4)[0].metrics == report.metrics
    assert check(tmp_path / "out", text, other, max_overlap=None, ngram=1)[0].metrics["overlap_share"] > 0.5


def test_a_text_without_words_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^eval: there is no word in eval; give held-out text to score$"):
        check(tmp_path / "out", write("eval", ["...", ""]), write("train", ["a b"]))


def test_what_conversations_say_is_compared(write: Write, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "Tell me of a garden."}, {"role": "assistant", "content": ENGLISH[1]}]]
    report, _ = check(tmp_path / "out", write("eval", ENGLISH), write("train", chats, "messages"), max_overlap=None)
    assert report.metrics["overlap_documents"] == 1 and 0.25 < report.metrics["overlap_share"] < 0.4


@pytest.mark.parametrize("name", ["german", "french", "chinese", "code"])
def test_another_language_and_code_are_pointed_out(write: Write, tmp_path: Path, name: str) -> None:
    other = [text for _, text in Dataset(TEXTS / f"{name}.txt").documents()]
    for one, two in ((ENGLISH, other), (other, ENGLISH)):
        report, (note,) = check(tmp_path / "out", write("eval", one), write("calibration", two))
        assert note.startswith("calibration looks like another language or domain than eval: their distance is ")
        assert f"halves of eval {report.metrics['domain_baseline']:.2f}" in note
        assert report.metrics["domain_shift"] > 0.3


def test_other_text_of_the_same_language_is_not_pointed_out(write: Write, tmp_path: Path) -> None:
    report, notes = check(tmp_path / "out", write("eval", ENGLISH), write("calibration", MORE_ENGLISH))
    assert not notes and report.metrics["domain_shift"] < 0.15
    report, notes = check(tmp_path / "out", write("eval", GERMAN[:1]), write("calibration", GERMAN[1:]))
    assert notes == ["eval and calibration hold too little text to tell whether they are of one kind"]
    assert "domain_shift" not in report.metrics


@pytest.mark.parametrize(("split", "share"), [("calibration", 0.006), ("train", 0.0086)])
def test_the_shipped_texts_pass(tmp_path: Path, split: str, share: float) -> None:
    """Modules of one library share licences and idioms: a sixteenth of the limit, and more."""
    report, notes = check(tmp_path, opened(ASSETS / "eval.jsonl", "eval"), opened(ASSETS / f"{split}.jsonl", split))
    assert report.metrics["overlap_share"] == pytest.approx(share, abs=1e-4) and not notes
    assert report.metrics["identical_documents"] == 0 and report.metrics["domain_shift"] < 0.05
    assert check(tmp_path, opened(ASSETS / "eval.jsonl", "eval"), opened(ASSETS / f"{split}.jsonl", split))[0].metrics == report.metrics


def test_of_the_larger_text_nothing_is_kept() -> None:
    small = Prints.of([("0", " ".join(words(0, 500)))], 13)

    documents = [" ".join(words(seed, 10_000)) for seed in range(5)]

    def large() -> Iterator[tuple[str, str]]:
        for number in range(100):
            yield str(number), documents[number % 5][number:]

    sample = TextSample()
    tracemalloc.start()
    there = small.also_in(sample.watch(large()), 13)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(there.ngrams) == len(small.ngrams)
    assert peak < KEPT_PIECES * PIECE_BYTES + 2_500_000  # one document of 40 KB and its words; the text has 4 MB
    assert len(sample.pieces) == KEPT_PIECES and sample.seen > 3 * KEPT_PIECES
    kept = [document for document, _ in sample.pieces]
    assert min(kept) < 10 and max(kept) > 90 and 45 < np.mean(kept) < 55  # from all of it


def test_tasks_and_the_evaluation_text_itself_are_refused_by_a_plan() -> None:
    text = DatasetSpec(split="eval", digest="1", nbytes=10)
    with pytest.raises(InputProblems) as refused:
        DataCheck().infer(text, DatasetSpec(split="tasks", format="tasks", digest="1", nbytes=10))
    assert refused.value.problems == [
        "other: tasks holds evaluation tasks; name a split of format text or messages",
        "other: it is the evaluation text itself; name what the model is calibrated or trained on",
    ]
    pending = DatasetSpec(split="train", digest="", nbytes=10)
    assert DataCheck().infer(pending, pending) is None  # type: ignore[func-returns-value]
    assert DataCheck().explain(text, pending) == ["stops the run where more than 10 % of the 13-grams of eval also stand in train"]
    assert DataCheck.from_dict({"max_overlap": None}).explain(text, pending) == []


def test_memory_is_for_the_smaller_text() -> None:
    text, train = (DatasetSpec(split="x", file_format="jsonl", digest="", nbytes=nbytes) for nbytes in (10**6, 10**10))
    assert DataCheck().memory(text, train, Target.host()) == DataCheck().memory(train, text, Target.host())
    assert DataCheck().memory(text, train, Target.host()).totals["ram"] < 2e8


def test_neither_torch_nor_a_model_is_needed(tmp_path: Path, write: Write) -> None:
    text, other = write("eval", ENGLISH), write("train", MORE_ENGLISH)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\nfrom pipeline.artifact import Dataset\nfrom pipeline.stage import Context\n"
        "from stages.data_check import DataCheck\n"
        "print('numpy' in sys.modules)\n"
        "report = DataCheck().run(Context(Path(sys.argv[1]), id), *(Dataset(Path(file)) for file in sys.argv[2:]))\n"
        "print(report.metrics['documents'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(text.path), str(other.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "3.0"]
