"""What an interrupted attempt left is continued by the same code, and by nothing else."""

from pathlib import Path

import pytest

from pipeline import attempt
from pipeline.attempt import Attempt
from pipeline.stage import Stage, find_stage
from pipeline.store import Store

KEY = "0123456789abcdef"


class Resuming(find_stage("rtn")):  # type: ignore[misc]
    resumes = True


def interrupted(store: Store, stage: Stage) -> Attempt:
    """An attempt that wrote a file, published or not, and was then killed."""
    made = Attempt(store, stage, KEY)
    (made.folder / "half").write_text("made")
    (made.folder / "half").chmod(0o444)
    return made


def test_a_resuming_stage_finds_its_files_writable_and_the_count_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, Resuming()).resumed()
    again = Attempt(store, Resuming(), KEY)
    assert ((again.folder / "half").read_text(), again.note, again.resumes) == ("made", "", 1)
    (again.folder / "half").write_text("whole")
    again.resumed()
    assert Attempt(store, Resuming(), KEY).resumes == 2


def test_other_code_starts_again_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    interrupted(store, Resuming()).resumed()
    monkeypatch.setattr(attempt, "fingerprint", lambda module: "changed")
    again = Attempt(store, Resuming(), KEY)
    assert list(again.folder.iterdir()) == [] and again.resumes == 0
    assert again.note == "an interrupted attempt is not continued, because the code of rtn has changed since; it starts again"
    assert Attempt(store, Resuming(), KEY).note == ""  # there is nothing to lose any more


def test_files_of_an_unknown_author_are_not_continued(tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, Resuming())
    store.attempt(KEY).write_text("{")
    again = Attempt(store, Resuming(), KEY)
    assert list(again.folder.iterdir()) == [] and again.note


def test_a_stage_that_does_not_resume_starts_in_an_empty_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain = find_stage("rtn")()
    interrupted(store, plain)
    again = Attempt(store, plain, KEY)
    assert (list(again.folder.iterdir()), again.note) == ([], "")
    store.discard(KEY)
    assert list((tmp_path / "scratch").iterdir()) == []
