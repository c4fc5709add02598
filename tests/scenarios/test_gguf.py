"""A model is exported to GGUF: planned, refused, made, measured and handed out."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from pipeline.gguf_file import read_gguf
from tests.scenarios.conftest import UNTRACKED, Run
from tests.stages.models import make_checkpoint

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@pytest.fixture
def recipe(folder: Path, model: Path) -> str:
    (folder / "export.yaml").write_text(
        f"""# Prune and export.
defaults:
  - /stage@stages.prune: structured_prune
  - /stage@stages.kv_cache: kv_cache
  - /stage@stages.gguf: gguf
  - /stage@stages.evaluate: evaluate
  - _self_
order: [prune, gguf]
model: {{path: {model}}}
data: {{splits: {{calibration: data/calibration.txt, eval: data/eval.txt}}}}
stages:
  prune: {{mlp_ratio: 0.5, group_size: 64}}
"""
    )
    return "recipe=export.yaml"


def report_of(folder: Path) -> dict[str, object]:
    (file,) = (folder / "outputs" / "runs" / "export").glob("*/report.json")
    content: dict[str, object] = json.loads(file.read_text())
    return content


def test_the_plan_names_what_falls_back_and_counts_it(run: Run, recipe: str) -> None:
    done = run(recipe, "mode=plan")
    assert done.code == 0
    assert "gguf: rows of 128 are no multiple of 256, so that model.embed_tokens fall back from Q8_0" not in done.out
    assert "model.layers.*.self_attn.q_proj" in done.out and "fall back from Q4_K to Q5_0" in done.out


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_by_the_plan(run: Run, recipe: str, folder: Path) -> None:
    other = make_checkpoint(folder / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    done = run(recipe, "mode=plan", f"model.path={other}", "order=[gguf]")
    assert done.code == 2
    assert done.errors == [
        "error: stages.gguf.inputs.model: its pre-tokenizer (Whitespace, without ignore_merges) is none that llama.cpp is known to have; "
        "known are: dbrx, gpt-2, llama-bpe, qwen2, smollm; it cannot be exported to GGUF"
    ]


def test_f16_needs_no_llama_cpp_and_says_that_it_was_not_opened(run: Run, recipe: str, folder: Path, tmp_path: Path) -> None:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['llama_cpp'] = None\n")
    root = Path(__file__).parents[2]
    path = {"PYTHONPATH": f"{folder / 'site'}:{root}"}
    done = run(recipe, "order=[gguf]", "stages.gguf.format=F16", "export_to=handed_out", UNTRACKED, env=path)
    assert done.code == 0, done.err
    assert "not opened by llama.cpp: llama-cpp-python is not installed" in done.err + done.out
    made = folder / "handed_out"
    assert read_gguf(made / "model.gguf").metadata["llama.feed_forward_length"] == 512
    assert {"model.gguf", "tokenizer.json", "README.md", "serving.yaml"} <= {file.name for file in made.iterdir()}
    assert report_of(folder)["final"]["type"] == "Export"  # type: ignore[index]


@pytest.mark.extras
@needs_llama_cpp
def test_an_export_is_measured_beside_its_source_and_served(run: Run, recipe: str, folder: Path) -> None:
    done = run(recipe, "order=[prune,kv_cache,gguf,evaluate]", "stages.gguf.format=Q8_0", "export_to=handed_out")
    assert done.code == 0, done.err
    assert "read" in done.out and "planned  bytes exact" in done.out and "from_pretrained" not in done.out
    report = report_of(folder)
    metrics = report["metrics"]
    assert isinstance(metrics, dict) and metrics["perplexity"] > 1 and metrics["kl_divergence"] > 0
    assert metrics["nbytes"] == read_gguf(folder / "handed_out" / "model.gguf").tensor_bytes
    serving = yaml.safe_load((folder / "handed_out" / "serving.yaml").read_text())
    assert "llama.cpp" in serving["engines"] and "lmdeploy" not in serving["engines"]
    command = serving["engines"]["llama.cpp"]["command"]
    assert command.startswith("llama-server -m ") and command.endswith("model.gguf -ctk q8_0 -ctv q8_0 -fa on")
    assert serving["kv_cache"]["mode"] == "q8_0"
    again = run(recipe, "order=[prune,kv_cache,gguf,evaluate]", "stages.gguf.format=Q8_0")
    assert again.code == 0 and "to run" not in again.out
