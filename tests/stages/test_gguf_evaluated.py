"""`evaluate` and `benchmark` on an export: llama.cpp scores what transformers scores, token by token, and is timed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifact import Dataset, DenseCheckpoint, EvalReport, Export
from pipeline.artifact_spec import DatasetSpec
from pipeline.errors import InputProblems
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.stage import Context
from pipeline.target import Target
from stages.benchmark import BenchmarkStage
from stages.evaluate import Evaluate
from stages.gguf import GGUF
from tests.stages.models import make_checkpoint, write_documents

pytest.importorskip("llama_cpp")

from stages.runtime.llama_cpp_engine import LlamaContext, LlamaModel, Token

pytestmark = pytest.mark.extras

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), **SIZES)
    return DenseCheckpoint(folder, DenseCheckpoint(folder).model_spec)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    file = write_documents(tmp_path_factory.mktemp("text") / "eval.jsonl", count=12)
    return Dataset(file, DatasetSpec(split="eval", digest="00", nbytes=file.stat().st_size))


def exported(model: DenseCheckpoint, folder: Path, form: str) -> Export:
    folder.mkdir()
    return GGUF.from_dict({"format": form}).run(Context(folder, lambda event: None), model)


def scored(folder: Path, stage: Evaluate, **inputs: Any) -> dict[str, Any]:
    folder.mkdir()
    made: EvalReport = stage.run(Context(folder, lambda event: None), **inputs)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["metrics"] == made.metrics
    return report


def test_an_f16_export_is_scored_as_its_checkpoint(model: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    stage = Evaluate.from_dict({"max_length": 48}, {"batch_size": 3})
    made = exported(model, tmp_path / "gguf", "F16")
    theirs = scored(tmp_path / "a", stage, model=made, eval=text, reference=model)
    ours = scored(tmp_path / "b", stage, model=model, eval=text)
    assert [row["tokens"] for row in theirs["documents"]] == [row["tokens"] for row in ours["documents"]]
    assert [row["tokens"] for row in theirs["positions"]] == [row["tokens"] for row in ours["positions"]]
    for row, expected in zip(theirs["documents"], ours["documents"], strict=True):  # the checkpoint computes in bf16
        assert row["reference_nll"] == pytest.approx(expected["nll"], rel=1e-6) and row["nll"] == pytest.approx(expected["nll"], rel=5e-3)
    metrics = theirs["metrics"]
    assert 0 <= metrics["kl_divergence"] < 2e-3 and metrics["top1_agreement"] > 0.95
    assert metrics["nbytes"] == made.model_spec.nbytes and "kv_cache_nbytes" not in metrics


def test_fewer_bits_are_farther_from_the_reference(model: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    stage = Evaluate.from_dict({"max_length": 64, "max_documents": 4})
    found = {}
    for form in ("F16", "Q8_0", "Q4_K_M", "Q2_K"):
        made = exported(model, tmp_path / form, form)
        found[form] = scored(tmp_path / f"{form}-report", stage, model=made, eval=text, reference=model)["metrics"]["kl_divergence"]
    assert list(found.values()) == sorted(found.values())


def test_the_int8_cache_is_scored_and_its_own_cost_and_size_are_told(model: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", **SIZES)
    write_cache(folder, CacheSettings(mode="per_token_head"))
    with_cache = DenseCheckpoint(folder, model.model_spec.with_cache("per_token_head"))
    made, stage = exported(with_cache, tmp_path / "gguf", "Q8_0"), Evaluate.from_dict({"max_length": 64, "max_documents": 4})
    metrics = scored(tmp_path / "report", stage, model=made, eval=text, reference=model)["metrics"]
    assert 0 < metrics["kv_cache_kl_divergence"] < metrics["kl_divergence"]
    assert metrics["kv_bytes_per_token"] == 2 * 2 * 2 * 34 == made.model_spec.kv_cache.bytes_per_token
    assert metrics["kv_cache_nbytes"] % metrics["kv_bytes_per_token"] == 0
    plain = exported(model, tmp_path / "plain", "Q8_0")
    without = scored(tmp_path / "plain-report", stage, model=plain, eval=text, reference=model)["metrics"]
    change = 100 * (metrics["perplexity"] / without["perplexity"] - 1)
    assert metrics["kv_cache_perplexity_change_pct"] == pytest.approx(change, abs=1e-3)


def test_a_reference_layer_by_layer_gives_the_same_report(model: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    made = exported(model, tmp_path / "gguf", "Q8_0")
    modes = [{"mode": "resident"}, {"mode": "layerwise", "hidden_states": 1 << 16}]
    reports = [
        scored(tmp_path / settings["mode"], Evaluate.from_dict({"max_length": 64}, settings), model=made, eval=text, reference=model)  # type: ignore[index]
        for settings in modes
    ]
    for name, value in reports[0]["metrics"].items():
        assert reports[1]["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_windows_longer_than_a_chunk_are_scored_whole(
    model: DenseCheckpoint, text: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stage = exported(model, tmp_path / "gguf", "Q8_0"), Evaluate.from_dict({"max_length": 64, "max_documents": 3})
    whole = scored(tmp_path / "whole", stage, model=made, eval=text, reference=model)["metrics"]
    monkeypatch.setattr("stages.runtime.llama_cpp_engine.chunk_tokens", lambda vocab_size: 7)
    cut = scored(tmp_path / "cut", stage, model=made, eval=text, reference=model)["metrics"]
    assert math.isclose(whole["nll_per_token"], cut["nll_per_token"], rel_tol=1e-3) and whole["tokens"] == cut["tokens"]


def test_text_that_llama_cpp_reads_otherwise_is_not_scored(model: DenseCheckpoint, text: Dataset, tmp_path: Path) -> None:
    """The tokenizer beside the export is changed behind its back."""
    made = exported(model, tmp_path / "gguf", "Q8_0")
    file = made.path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"llama\.cpp reads document doc0 as other tokens than transformers: from token \d+ on"):
        scored(tmp_path / "report", Evaluate.from_dict({}), model=made, eval=text)


def test_memory_holds_the_file_the_cache_and_the_reference(model: DenseCheckpoint, text: Dataset) -> None:
    stage, host = Evaluate.from_dict({"max_length": 64}), Target.host()
    spec = GGUF.from_dict({"format": "Q8_0"}).infer(model.model_spec)
    alone = stage.memory(spec, text.spec, host)
    beside = stage.memory(spec, text.spec, host, reference=model.model_spec)
    assert alone.ram["the GGUF file, mapped"] == spec.nbytes and alone.ram["llama.cpp's KV cache"] == 64 * spec.kv_cache.bytes_per_token
    assert beside.totals["ram"] - alone.totals["ram"] >= model.model_spec.nbytes


@pytest.mark.parametrize("form", ["F16", "Q4_K_M"])
def test_an_export_is_timed_and_decodes_what_it_computes(form: str, model: DenseCheckpoint, tmp_path: Path) -> None:
    """Greedy tokens of two sequences at once are those of each alone."""
    made, folder = exported(model, tmp_path / "gguf", form), tmp_path / "speed"
    folder.mkdir()
    stage = BenchmarkStage.from_dict({"engine": "llama.cpp", "batch_sizes": [1, 2], "prompt_tokens": 24, "new_tokens": 6, "repeats": 2})
    metrics = stage.run(Context(folder, lambda event: None), made).metrics
    assert metrics["weights_bytes"] == made.model_spec.nbytes
    assert all(metrics[f"{name}_tokens_per_second_b{batch}"] > 0 for name in ("prefill", "decode") for batch in (1, 2))
    prompt = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with LlamaModel(made.file) as opened:
        together, alone = (greedy(opened, rows) for rows in (prompt, prompt[:1]))
    assert together[0] == alone[0] and together[0] != together[1]


def greedy(model: LlamaModel, prompt: torch.Tensor) -> list[list[int]]:
    """Four new tokens of each row."""
    rows = [list(row) for row in prompt.tolist()]
    with LlamaContext(model, 32, False, 1, sequences=len(rows)) as context:
        latest = [context.decode([Token(n, at, row, at == 23) for at, n in enumerate(ids)]) for row, ids in enumerate(rows)]
        found = [[int(logits.argmax())] for logits in latest]
        for step in range(3):
            logits = context.decode([Token(ids[-1], 24 + step, row, output=True) for row, ids in enumerate(found)])
            for ids, token in zip(found, logits.argmax(-1).tolist(), strict=True):
                ids.append(token)
    return found


def test_an_engine_that_does_not_fit_the_model_is_refused(model: DenseCheckpoint) -> None:
    spec = GGUF.from_dict({"format": "Q8_0"}).infer(model.model_spec)
    for engine, given, told in (("transformers", spec, "write engine: llama.cpp"), ("llama.cpp", model.model_spec, "put gguf before it")):
        with pytest.raises(InputProblems, match=told):
            BenchmarkStage.from_dict({"engine": engine, "prompt_tokens": 24, "new_tokens": 4}).infer(given)
