"""Environments of isolated backends: exact locks, built once and whole or not at all."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from pipeline import envs
from pipeline.collect import collect
from pipeline.envs import Environments, lock_digest, pins, uv_settings
from pipeline.errors import PlanError
from pipeline.installed import package_path
from pipeline.store import Store, check_writable

SHIPPED = sorted(file.stem for file in envs._folder().glob("*.txt"))


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock `tiny` of one package, which lies in a folder of wheels: no index is asked."""
    locks, wheels = tmp_path / "locks", tmp_path / "wheels"
    locks.mkdir()
    wheels.mkdir()
    (locks / "tiny.txt").write_text("# a comment\ntinyback==1.0\n")
    with zipfile.ZipFile(wheels / "tinyback-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinyback.py", "answer = 42\n")
        wheel.writestr("tinyback-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyback\nVersion: 1.0\n")
        wheel.writestr("tinyback-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinyback-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(envs, "_folder", lambda: locks)
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))  # pip's setting, which uv is given
    for cached in (envs.lock_file, envs.pins, envs.lock_digest):
        cached.cache_clear()
    yield locks
    for cached in (envs.lock_file, envs.pins, envs.lock_digest):
        cached.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_lock_holds_exact_versions_and_no_place_to_get_them(name: str) -> None:
    assert len(pins(name)) > 40 and {"torch", "transformers", "pydantic"} <= set(pins(name))
    content = envs.lock_file(name).read_text()
    assert "://" not in content and "--" not in content and "@" not in content
    assert not any("+" in version for version in pins(name).values()), (
        "a label says what torch was built for, which is the machine's matter"
    )


def test_a_backends_environment_holds_that_backend() -> None:
    assert SHIPPED == ["gptqmodel", "legacy"]
    assert (pins("legacy")["autoawq"], pins("legacy")["auto-gptq"], "triton" in pins("legacy")) == ("0.2.9", "0.7.1", False)
    assert (pins("gptqmodel")["gptqmodel"], pins("gptqmodel")["numpy"]) == ("7.6.0", "2.2.6")


def test_a_digest_is_of_versions_and_not_of_comments_or_order(local: Path) -> None:
    contents = ("a==1\nb==2\n", "# said\nb==2  # why\n\na==1\n", "a==1\nb==3\n")
    for name, content in zip("xyz", contents, strict=True):
        (local / f"{name}.txt").write_text(content)
    assert lock_digest("x") == lock_digest("y") != lock_digest("z")


@pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "torch==2,<3"])
def test_a_lock_that_is_not_exact_is_refused(local: Path, line: str) -> None:
    (local / "loose.txt").write_text(line)
    with pytest.raises(ValueError, match="is not an exact version"):
        pins("loose")


def test_an_environment_that_does_not_exist_is_named_with_those_that_do(local: Path) -> None:
    with pytest.raises(PlanError, match="there is no environment 'tony'; did you mean 'tiny'"):
        lock_digest("tony")


def test_it_is_built_once_and_its_interpreter_holds_the_packages(local: Path, tmp_path: Path) -> None:
    said: list[str] = []
    environments = Environments(tmp_path / "outputs")
    assert not environments.is_built("tiny")
    python = environments.python("tiny", said.append)
    assert environments.is_built("tiny")
    assert subprocess.check_output([python, "-c", "import tinyback; print(tinyback.answer)"], text=True) == "42\n"
    assert re.search("installing 1 packages, once", said[0]) and "installed in" in said[1]
    assert environments.python("tiny", said.append) == python and len(said) == 2, "the second time nothing is done"
    (planned,) = environments.planned([("quantize", "tiny"), ("evaluate", "main"), ("again", "tiny")])
    assert planned.nodes == ("quantize", "again") and planned.built and "is built" in planned.sentence


def test_another_version_in_the_lock_is_another_environment(local: Path, tmp_path: Path) -> None:
    environments = Environments(tmp_path / "outputs")
    before = environments.folder("tiny")
    (local / "tiny.txt").write_text("tinyback==1.1\n")
    envs.pins.cache_clear()
    envs.lock_digest.cache_clear()
    assert environments.folder("tiny") != before


def test_one_that_was_left_half_built_is_built_again(local: Path, tmp_path: Path) -> None:
    environments = Environments(tmp_path / "outputs")
    folder = environments.folder("tiny")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("half an interpreter")
    assert not environments.is_built("tiny")
    python = environments.python("tiny", lambda _: None)
    assert subprocess.run([python, "-c", "import tinyback"]).returncode == 0


def test_a_build_that_is_killed_at_any_moment_leaves_none_or_a_whole_one(local: Path, tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from pipeline import envs
from pipeline.collect import collect
        envs._folder = lambda: Path({str(local)!r})
        envs.Environments(Path({str(tmp_path / "outputs")!r})).python("tiny", lambda text: print(text, flush=True))
        """)
    )
    environments = Environments(tmp_path / "outputs")
    for delay in (0.0, 0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, start_new_session=True, env={**os.environ, **package_path()}
        )
        assert process.stdout
        process.stdout.readline()  # it has begun
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if environments.is_built("tiny"):
            break
    python = environments.python("tiny", lambda _: None)
    assert subprocess.run([python, "-c", "import tinyback"]).returncode == 0


def test_without_a_package_index_it_is_one_sentence_with_the_log(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (local / "tiny.txt").write_text("nothing-of-this-name==1.0\n")
    monkeypatch.delenv("PIP_FIND_LINKS")
    environments = Environments(tmp_path / "outputs")
    with pytest.raises(PlanError) as caught:
        environments.python("tiny", lambda _: None)
    (sentence,) = caught.value.problems
    log = environments.folder("tiny").with_suffix(".log")
    assert sentence == f"environment tiny: it cannot be built without a package index, and none could be reached; see {log}"
    assert "nothing-of-this-name" in log.read_text()
    assert not environments.is_built("tiny")


def test_uv_is_given_pips_settings_where_it_has_none_of_its_own() -> None:
    pips = {"PIP_INDEX_URL": "a", "PIP_EXTRA_INDEX_URL": "b  c", "PIP_FIND_LINKS": "/d /e"}
    given = uv_settings(pips)
    assert (given["UV_DEFAULT_INDEX"], given["UV_INDEX"], given["UV_FIND_LINKS"]) == ("a", "b c", "/d,/e")
    assert uv_settings(pips | {"UV_DEFAULT_INDEX": "mine"})["UV_DEFAULT_INDEX"] == "mine"
    assert not any(name.startswith("UV_") for name in uv_settings({"HOME": "/"}))


def test_the_mark_names_the_lock_that_was_built(local: Path, tmp_path: Path) -> None:
    environments = Environments(tmp_path / "outputs")
    environments.python("tiny", lambda _: None)
    mark = environments.folder("tiny") / envs.MARK
    assert json.loads(mark.read_text())["digest"] == lock_digest("tiny")
    mark.write_text("{}")
    assert not environments.is_built("tiny"), "a damaged mark is none"


def test_gc_removes_environments_of_other_locks_and_keeps_those_of_todays(local: Path, tmp_path: Path) -> None:
    environments, store = Environments(tmp_path / "outputs"), Store(tmp_path / "outputs")
    check_writable(store.root)
    environments.python("tiny", lambda _: None)
    outdated = store.root / "envs" / "0123456789ab"
    outdated.mkdir()
    (outdated / "file").write_text("old")
    assert collect(store).removed == (outdated,)
    assert environments.is_built("tiny") and not outdated.exists()
