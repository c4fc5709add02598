"""What is carried to a card: tracked files only, in the pinned versions, and no more than may be carried."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.gpu import bundle

FILES = {"pipeline/plan.py": "", "assets/data/eval.jsonl": "{}", "assets/small-llama/model.safetensors": "weights", "tests/gpu/run.sh": ""}


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a file that nobody tracks, and one of another folder."""
    root = tmp_path / "repository"
    for name, content in {**FILES, "recipes/one.yaml": ""}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    git(root.parent, "init", "--quiet", str(root))
    git(root, "add", "--all")
    (root / "pipeline/notes.txt").write_text("not for others")
    return root


def test_tracked_files_travel_and_nothing_else(repository: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one-1.0-py3-none-any.whl").write_text("")
    total = bundle.pack(repository, wheels, tmp_path / "bundle.tar.gz")
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        found = {name.removeprefix(f"{bundle.NAME}/") for name in archive.getnames()}
    carried = {"pipeline/plan.py", "assets/data/eval.jsonl", "tests/gpu/run.sh"}
    assert found == {f"tree/{name}" for name in carried} | {"wheels/one-1.0-py3-none-any.whl", "run.sh"}
    assert total == len("{}")


def test_more_than_may_be_carried_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIMIT", 10)
    assert bundle.pack(repository, tmp_path / "none", tmp_path / "fits.tar.gz") == 2
    (repository / "pipeline/plan.py").write_text("123456789")
    with pytest.raises(SystemExit, match=r"has 11 bytes and 10 may be carried; its largest file is plan.py with 9"):
        bundle.pack(repository, tmp_path / "none", tmp_path / "large.tar.gz")
    assert not (tmp_path / "large.tar.gz").exists()


def test_this_repositorys_tree_leaves_room_for_the_wheels() -> None:
    files = [bundle.ROOT / name for name in bundle.tracked(bundle.ROOT)]
    assert bundle.check_size(files) < bundle.LIMIT // 4
    assert {Path("tests/gpu/measure.py"), Path("bench/memory.py")} <= {file.relative_to(bundle.ROOT) for file in files}


def test_every_wheel_is_pinned_and_the_absent_are_not_among_them() -> None:
    assert set(bundle.WHEELS) <= set(bundle.pins(bundle.ROOT))
    assert not {"hydra-core", "omegaconf", "mlflow", "bitsandbytes", "torch"} & set(bundle.WHEELS)
