"""The fingerprint of a stage's code: what it sees, and that what is remembered of it is never of other code."""

import ast
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import remembered, stage_code
from pipeline.identity import canonical
from pipeline.remembered import cache_folder
from tests.yardsticks import work_seconds

MEMOS = (stage_code.fingerprint, stage_code._code, stage_code._place)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield cache_folder()
    forget()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just written count as old, so that tests need not wait."""
    monkeypatch.setattr(remembered, "SETTLED", -1)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules; one that stands as `stages.lent`, which only a stage leads to."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(importlib.import_module("stages"), "__path__", [*importlib.import_module("stages").__path__, str(folder)])
    return folder


def fingerprint(module: str = "fingerprinted") -> str:
    """As another process would find it."""
    forget()
    return stage_code.fingerprint(module)


def forget() -> None:
    """What this process knows."""
    for found in MEMOS:
        found.cache_clear()
    importlib.invalidate_caches()


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, no code is looked at."""
    monkeypatch.setattr(stage_code, "_collect", lambda module: pytest.fail("the fingerprint was not remembered"))


def test_it_sees_code_and_not_comments(site: Path) -> None:
    digests = []
    for source in ("x = 1\n", "# why\n\nx = 1  # one\n", "x = 2\n"):
        (site / "fingerprinted.py").write_text(source)
        digests.append(fingerprint())
    assert digests[0] == digests[1] != digests[2]


def test_it_follows_what_a_stage_imports() -> None:
    """Editing the shared runtime changes the fingerprint of the stages that use it."""
    spec = importlib.util.find_spec("stages.rtn")
    assert spec and spec.origin
    source = Path(spec.origin).read_text()
    assert "from stages." in source
    alone = hashlib.sha256(canonical([("stages.rtn", ast.unparse(ast.parse(source)))]).encode())
    assert fingerprint("stages.rtn") != alone.hexdigest()[:16]


def test_it_is_remembered_and_read_no_second_time(site: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint("stages.rtn")
    unread(monkeypatch)
    assert fingerprint("stages.rtn") == first


def test_remembering_takes_a_fraction_of_computing(settled: None) -> None:
    def compute() -> None:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        fingerprint("stages.distill")

    assert work_seconds(lambda: fingerprint("stages.distill")) < 0.2 * work_seconds(compute)


@pytest.mark.parametrize("same_times", [False, True])
def test_an_edited_stage_has_another_one(site: Path, settled: None, same_times: bool) -> None:
    file = site / "fingerprinted.py"
    file.write_text("x = 1\n")
    before, status = fingerprint(), file.stat()
    other = site / "other"
    other.write_text("x = 2\n")
    if same_times:
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert fingerprint() != before


def test_so_has_one_of_which_an_imported_module_was_edited_added_or_moved(site: Path, settled: None) -> None:
    (site / "fingerprinted.py").write_text("from stages.lent import x\n")
    seen = [fingerprint()]
    for source in ("x = 1\n", "x = 22\n"):
        (site / "lent.py").write_text(source)
        sys.modules.pop("stages.lent", None)
        seen.append(fingerprint())
    (site / "lent").mkdir()
    (site / "lent.py").rename(site / "lent" / "__init__.py")
    assert len(set(seen)) == 3 and fingerprint() == seen[-1], "the same code in another file is the same code"
    (site / "lent" / "__init__.py").write_text("x = 333\n")
    assert fingerprint() not in seen


def test_another_module_of_the_same_name_is_not_taken_for_it(
    site: Path, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "fingerprinted.py").write_text("x = 1\n")
    before = fingerprint()
    (tmp_path / "nearer").mkdir()
    shutil.copy2(site / "fingerprinted.py", tmp_path / "nearer")
    (tmp_path / "nearer" / "fingerprinted.py").write_text("x = 2\n")
    monkeypatch.syspath_prepend(tmp_path / "nearer")
    assert fingerprint() != before


def test_what_was_changed_a_moment_ago_is_not_remembered(site: Path, cache: Path) -> None:
    (site / "fingerprinted.py").write_text("x = 1\n")
    fingerprint()
    assert not cache.exists()


def test_a_file_changed_while_it_is_read_is_not_remembered_as_it_was(site: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site / "fingerprinted.py"
    file.write_text("x = 1\n")
    collect = stage_code._collect

    def edited_meanwhile(module: str) -> dict[str, str | None]:
        file.write_text("x = 22\n")
        return collect(module)

    with monkeypatch.context() as patched:
        patched.setattr(stage_code, "_collect", edited_meanwhile)
        fingerprint()
    file.write_text("x = 333\n")
    third = fingerprint()
    file.write_text("x = 22\n")
    assert fingerprint() != third


def test_a_changed_way_to_compute_it_forgets_the_old_ones(site: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint("stages.rtn")
    place = stage_code._place

    def edited(module: str) -> stage_code.Place | None:
        found = place(module)
        return found._replace(file="/edited.py") if found and module == stage_code.__name__ else found

    monkeypatch.setattr(stage_code, "_place", edited)
    monkeypatch.setattr(stage_code, "_without_comments", lambda source: "")
    assert fingerprint("stages.rtn") != first
