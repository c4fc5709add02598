"""Scenarios run the real command in a real folder, as a person would."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stages.models import TEXT, make_checkpoint

ROOT = Path(__file__).parents[2]
UNTRACKED = "tracking.enabled=false"  # where MLflow is not the matter: importing it costs as much as a small run


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that every stage can work on: widths divide by 64."""
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=300, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A person's working folder: a recipe of their own, their data, nothing else."""
    (tmp_path / "data").mkdir()
    for split in ("calibration", "eval"):
        text = "<|endoftext|>".join(f"{split} {i}: " + " ".join(TEXT) for i in range(6))
        (tmp_path / "data" / f"{split}.txt").write_text(text)
    (tmp_path / "mine.yaml").write_text(
        f"""# A recipe of one's own.
defaults:
  - /stage@stages.prune: structured_prune
  - /stage@stages.quantize: rtn
  - /stage@stages.evaluate: evaluate
  - _self_
order: [prune, quantize, evaluate]
model: {{path: {model}}}
data: {{splits: {{calibration: data/calibration.txt, eval: data/eval.txt}}}}
stages:
  prune: {{mlp_ratio: 0.5, group_size: 64}}
  quantize: {{group_size: 64}}
"""
    )
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """`run ARGUMENTS` in the person's folder. `blocked` modules cannot be imported."""

    def command(*arguments: str, env: dict[str, str] | None = None, blocked: tuple[str, ...] = ()) -> Outcome:
        code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nfrom pipeline.cli import main\nmain()"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", **(env or {})}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert "Traceback" not in done.stderr + done.stdout
        return Outcome(done.returncode, done.stdout, done.stderr)

    return command
