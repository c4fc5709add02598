"""What is wrong with a training recipe is said before any weight is read, each in a sentence; what only shows later loses nothing."""

import json
import shutil
from pathlib import Path

import pytest

from tests.scenarios.conftest import UNTRACKED, Outcome, Run
from tests.stages.models import TEXT


@pytest.fixture
def training(folder: Path, run: Run, model: Path) -> Run:
    """`run` of a recipe that prunes, distills, recovers and stores the cache as INT8; arguments change it."""
    (folder / "data" / "train.txt").write_text("<|endoftext|>".join(f"train {i}: " + " ".join(TEXT) for i in range(20)))
    data = ", ".join(f"{split}: data/{split}.txt" for split in ("train", "calibration", "eval"))
    (folder / "training.yaml").write_text(
        f"""
defaults:
  - /stage@stages.prune: structured_prune
  - /stage@stages.distill: distill
  - /stage@stages.recover: qlora
  - /stage@stages.cache: kv_cache
  - _self_
order: [prune, distill, recover, cache]
model: {{path: {model}}}
data: {{splits: {{{data}}}}}
stages:
  prune: {{mlp_ratio: 0.5, group_size: 64}}
  distill: {{inputs: {{teacher: model}}, num_samples: 8, max_length: 32, global_batch_size: 2}}
  recover: {{num_samples: 8, max_length: 32, global_batch_size: 2}}
"""
    )
    return lambda *arguments: run("recipe=training.yaml", *arguments)


def told(outcome: Outcome, code: int = 2) -> list[str]:
    assert outcome.code == code, outcome.err
    return [line.removeprefix("error: ") for line in outcome.errors]


def test_parameters_out_of_range_are_named_all_at_once(training: Run) -> None:
    errors = told(training("mode=plan", "stages.distill.temperature=0", "stages.distill.alpha=1.5", "stages.recover.rank=0"))
    assert [error.partition(":")[0] for error in errors] == ["stages.distill.temperature", "stages.distill.alpha", "stages.recover.rank"]


def test_what_the_shapes_and_the_data_rule_out_is_known_from_the_plan(training: Run) -> None:
    (error,) = told(training("mode=plan", "stages.distill.num_samples=100000"))
    assert error.startswith("stages.distill.num_samples: 100000 windows of 32 tokens need more text than the")
    (error,) = told(training("mode=plan", "stages.recover.rank=200"))
    assert error.startswith("stages.recover.rank: 200 is more than")


def test_a_split_that_is_missing_or_empty_is_named(training: Run, folder: Path) -> None:
    errors = told(training("mode=plan", "~data.splits.train"))
    assert errors == [
        f"data.splits: {stage} needs a split `train`, there are: calibration, eval, tasks; write +data.splits.train=/file.jsonl"
        for stage in ("distill", "recover")
    ]
    (error,) = told(training("mode=plan", "data.splits.training=data/train.txt"))
    assert error == "data.splits.training: it is not there yet; to add it write +data.splits.training=/file.jsonl"
    (folder / "data" / "train.txt").write_text("<|endoftext|>\n")
    (error,) = told(training("mode=plan"))
    assert error.startswith("data.splits.train: ") and error.endswith("holds no document")


def test_a_text_that_is_too_short_for_its_windows_is_found_when_it_is_read(training: Run, folder: Path) -> None:
    (folder / "data" / "train.txt").write_text("word " * 60)  # bytes enough for 8 windows of 32, tokens not
    (error,) = told(training(UNTRACKED), 4)
    assert "windows of 32 tokens" in error and "8 were asked for" in error


def test_a_teacher_that_reads_other_tokens_is_refused(training: Run, folder: Path, model: Path) -> None:
    other = Path(shutil.copytree(model, folder / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (error,) = told(training("mode=plan", f"+models.large.path={other}", "stages.distill.inputs.teacher=models.large"))
    assert error.startswith("stages.distill.inputs.teacher: models.large and prune.model (student) have different tokenizers")


def test_a_static_cache_stands_after_what_changes_weights(training: Run) -> None:
    (error,) = told(training("mode=plan", "order=[prune,cache,recover]", "stages.cache.mode=static"))
    assert error == (
        "order: recover changes the weights that the static KV cache of cache was calibrated with; "
        "move cache after recover, or write mode: per_token_head"
    )


def test_a_training_that_diverges_is_one_sentence_and_what_was_done_before_stays(training: Run, folder: Path) -> None:
    (error,) = told(
        training(UNTRACKED, "order=[prune,distill]", "stages.distill.learning_rate=1e30", "stages.distill.compute_dtype=fp32"), 4
    )
    assert error.startswith("distill: the training diverged at update") and "lower learning_rate" in error
    assert [path.name.rpartition("-")[0] for path in (folder / "outputs" / "store").iterdir()] == ["structured_prune"]


def test_every_problem_of_one_stage_is_told(training: Run) -> None:
    errors = told(training("mode=plan", "~stages.distill.inputs.teacher", "+stages.distill.lora.rank=4", "stages.recover.num_samples=2"))
    assert [error.partition(":")[0] for error in errors] == ["stages.distill.lora", "stages.distill.inputs.teacher"]


def test_a_training_that_would_be_all_warmup_is_refused(training: Run) -> None:
    (error,) = told(training("mode=plan", "stages.distill.num_samples=2"))
    assert error.startswith("stages.distill.num_samples: 2 samples make 1 update, all of it warmup")
