"""What does each GGUF format cost in quality, and what does it save? Exported, planned against the file, scored and timed by llama.cpp.

    python bench/gguf_formats.py [--model FOLDER] [--eval FILE] [--max-documents N]

Every export is scored against the source model as transformers computes it, on the same tokens and windows: first with llama.cpp's 16-bit
KV cache, then (q8_0) with its INT8 cache, for which the export itself is made again, since that is where the setting stands. Speed is
greedy decoding of one sequence on the CPU, the median of five runs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.artifact import Dataset, DenseCheckpoint, Export
from pipeline.artifact_spec import DatasetSpec
from pipeline.gguf_file import read_gguf
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.stage import Context, find_stage
from stages.runtime.gguf_mix import BASE
from stages.runtime.linked_folder import link_checkpoint

ASSETS = Path(__file__).parent.parent / "assets"
ROW = "{:<8} {:<5} {:>12} {:>12} {:>7} {:>11} {:>9} {:>9} {:>7} {:>9} {:>8}"
SPEED = {"engine": "llama.cpp", "batch_sizes": [1], "prompt_tokens": 128, "new_tokens": 64}


def run_stage(name: str, output: Path, params: dict[str, Any], **inputs: Any) -> Any:
    output.mkdir(parents=True)
    return find_stage(name).from_dict(params).run(Context(output, lambda event: None), **inputs)


def with_int8_cache(model: DenseCheckpoint, folder: Path) -> DenseCheckpoint:
    link_checkpoint(model.path, folder)
    write_cache(folder, CacheSettings(mode="per_token_head"))
    return DenseCheckpoint(folder, model.model_spec.with_cache("per_token_head"))


def measure(model: DenseCheckpoint, reference: DenseCheckpoint, text: Dataset, form: str, limit: int | None, folder: Path) -> None:
    """A row of the table: `model` says which KV cache the export is for."""
    started = time.perf_counter()
    made: Export = run_stage("gguf", folder / "gguf", {"format": form}, model=model)
    seconds = time.perf_counter() - started
    found = run_stage("evaluate", folder / "report", {"max_documents": limit}, model=made, eval=text, reference=reference).metrics
    speed = run_stage("benchmark", folder / "speed", SPEED, model=made).metrics
    planned, stored = find_stage("gguf").from_dict({"format": form}).infer(model.model_spec).nbytes, read_gguf(made.file).tensor_bytes
    print(
        ROW.format(
            form,
            made.model_spec.kv_cache.mode or "f16",
            f"{stored:,}",
            "exact" if planned == stored else f"{planned:,}",
            f"{made.model_spec.bits_per_weight:.2f}",
            f"{found['perplexity']:.4f}",
            f"{found['perplexity_change_pct']:+.2f} %",
            f"{found['kl_divergence']:.1e}",
            f"{found['top1_agreement']:.1%}",
            f"{speed['decode_tokens_per_second_b1']:,.0f}",
            f"{seconds:.1f} s",
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--eval", type=Path, default=ASSETS / "data" / "eval.jsonl")
    parser.add_argument("--max-documents", type=int)
    given = parser.parse_args()
    source = DenseCheckpoint(given.model, DenseCheckpoint(given.model).model_spec)
    text = Dataset(given.eval, DatasetSpec(split="eval", digest="", nbytes=given.eval.stat().st_size))
    print(ROW.format("format", "KV", "bytes", "planned", "bits/w", "perplexity", "change", "KL", "top-1", "tokens/s", "export"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [source]
        if source.model_spec.architecture.head_dim % 32 == 0:  # what llama.cpp's INT8 cache takes
            models.append(with_int8_cache(source, folder / "int8"))
        for form in BASE:
            for number, model in enumerate(models):
                measure(model, source, text, form, given.max_documents, folder / f"{form}-{number}")


if __name__ == "__main__":
    main()
