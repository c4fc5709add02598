"""Perplexity and divergence by position in the window: what a token's context is worth, and whether an error grows with it."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint
from pipeline.stage import Context
from stages.evaluate import Evaluate
from stages.kv_cache import KVCache
from stages.rtn import RTN
from stages.runtime.windows import position_buckets
from tests.stages.models import make_checkpoint, write_documents

LENGTH = 70  # two buckets, 0-64 and 64-70


def report(folder: Path, model: Checkpoint, text: Dataset, reference: Checkpoint | None = None, **execution: object) -> dict[str, Any]:
    stage = Evaluate.from_dict({"max_length": LENGTH}, {"device": "cpu", "batch_size": 4, **execution})
    content: dict[str, Any] = json.loads(
        (stage.run(Context(folder, lambda event: None), model, text, reference).path / "report.json").read_text()
    )
    return content


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    return DenseCheckpoint(make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2, dtype=torch.float32))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, source: DenseCheckpoint) -> Checkpoint:
    return RTN.from_dict({"group_size": 32, "num_bits": 3}).run(Context(tmp_path_factory.mktemp("q"), lambda event: None), source)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Some documents end within a window, so that no bucket holds as many tokens as another."""
    return Dataset(write_documents(tmp_path_factory.mktemp("data") / "eval.jsonl", count=5))


def test_each_bucket_equals_a_plain_loop_over_the_tokens_of_its_positions(
    tmp_path: Path, source: DenseCheckpoint, packed: Checkpoint, text: Dataset
) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(c.path, dtype="auto") for c in (packed, source))
    tokenizer, expected = AutoTokenizer.from_pretrained(source.path), defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for _, document in text.documents():
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids) - 1, LENGTH - 1):
            window = torch.tensor([ids[start : start + LENGTH]])
            with torch.no_grad():
                p, q = (m(window).logits[0].double().log_softmax(-1) for m in (theirs, ours))
            for position in range(1, window.shape[1]):
                word, a, b = window[0, position], p[position - 1], q[position - 1]
                one = [1.0, -b[word], -a[word], (a.exp() * (a - b)).sum(), a.argmax() == b.argmax()]
                expected[0 if position < 64 else 64] += torch.tensor(one, dtype=torch.float64)
    found = report(tmp_path, packed, text, source)
    assert [(row["from"], row["to"]) for row in found["positions"]] == [(0, 64), (64, LENGTH)]
    columns = ("tokens", "nll", "reference_nll", "kl", "top1_matches")
    for row in found["positions"]:
        assert [row[column] for column in columns] == pytest.approx(expected[row["from"]].tolist(), rel=1e-4)
    assert len({row["tokens"] for row in found["positions"]}) == 2 and all(row["kl"] > 0 for row in found["positions"])


@pytest.mark.parametrize("mode", ["per_token_head", "static"])
def test_with_an_int8_cache_the_ordinary_one_stands_beside_it_and_layerwise_says_the_same(
    tmp_path: Path, packed: Checkpoint, source: DenseCheckpoint, text: Dataset, mode: str
) -> None:
    calibration = {"num_samples": 4, "max_length": 32} if mode == "static" else {}
    cached = KVCache.from_dict({"mode": mode, **calibration}).run(Context(tmp_path / "c", lambda event: None), packed, text)
    found = report(tmp_path / "resident", cached, text, source)
    assert report(tmp_path / "layerwise", cached, text, source, mode="layerwise") == found
    documents, positions = found["documents"], found["positions"]
    assert positions[0].keys() - {"from", "to"} == documents[0].keys() - {"id", "bytes"} > {"plain_cache_nll", "plain_cache_kl"}
    for column in positions[0].keys() - {"from", "to"}:
        assert sum(row[column] for row in positions) == pytest.approx(sum(row[column] for row in documents), rel=1e-12)


def test_without_a_reference_a_bucket_has_only_its_own_loss(tmp_path: Path, source: DenseCheckpoint, text: Dataset) -> None:
    for row in report(tmp_path, source, text)["positions"]:
        assert row.keys() == {"from", "to", "tokens", "nll", "reference_nll", "kl", "top1_matches"}
        assert (row["reference_nll"], row["kl"], row["top1_matches"]) == (None, None, None) and row["nll"] > 0 < row["tokens"]


def test_a_bucket_that_no_token_reaches_is_left_out(tmp_path: Path, source: DenseCheckpoint) -> None:
    (tmp_path / "short.jsonl").write_text('{"id": "a", "text": "The quick brown fox."}\n')
    (row,) = report(tmp_path / "report", source, Dataset(tmp_path / "short.jsonl"))["positions"]
    assert (row["from"], row["to"]) == (0, 64)


def test_buckets_are_64_wide_to_512_and_then_double() -> None:
    even = [(first, first + 64) for first in range(0, 512, 64)]
    assert position_buckets(512) == even
    assert position_buckets(4096) == [*even, (512, 1024), (1024, 2048), (2048, 4096)]
    assert position_buckets(600) == [*even, (512, 600)]
    assert position_buckets(100) == [(0, 64), (64, 100)]
    assert position_buckets(64) == [(0, 64)] and position_buckets(2) == [(0, 2)]
