"""Hub models through the hub's own cache: the commit is the identity, and a hub that does not answer is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.models import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from pathlib import Path
from pipeline.errors import RecipeError
from pipeline.identity import DigestMemo
from pipeline.recipe import ModelSource
from pipeline.source import open_model
try:
    model = open_model(ModelSource(id=sys.argv[1]), Path(), DigestMemo(Path("memo.json")), execute=sys.argv[2] == "run")
    print(type(model).__name__, model.key, model.path, model.model_spec.nbytes)
except RecipeError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache as its own client lays it out, holding one model."""
    model = tmp_path / "hub" / "models--org--tiny"
    make_checkpoint(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path


def opened(cache: Path, model: str, mode: str) -> str:
    """In a process of its own: the hub's client reads its environment once, at import."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, mode], env=environment, cwd=cache, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_cached_hub_model_is_known_by_its_commit(cache: Path) -> None:
    from pipeline.identity import hub_key

    kind, key, path, _ = opened(cache, "org/tiny", "run").split()
    assert (kind, key) == ("DenseCheckpoint", hub_key("org/tiny", COMMIT))
    assert path.endswith(COMMIT)
    assert opened(cache, "org/tiny", "plan").split()[1] == key


@pytest.mark.parametrize("model", ["org/absent", "not a name"])
def test_a_model_that_the_hub_cannot_give_is_one_sentence(cache: Path, model: str) -> None:
    told = opened(cache, model, "run")
    assert told.startswith(f"model.id: '{model}' at revision 'main' cannot be had from the hub (")
    assert told.endswith("check the name and your access, or give model.path=/folder")
    assert "\n" not in told
