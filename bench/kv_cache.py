"""What does an INT8 KV cache save, what does it cost in quality, and what in time?

    python bench/kv_cache.py [--model FOLDER] [--calibration FILE] [--eval FILE] [--max-documents N]

Quality: each mode is evaluated against the same weights with the ordinary cache, on the same documents and in the same run; intervals
are 95 % paired bootstrap over documents, and one that holds 0 is called a tie. Once in the model's dtype, and once with everything in
fp32: in bf16 any change, however small, makes all later layers round differently, and that alone is most of the divergence that is seen.

Bytes are measured, of one sequence as long as the prompt, against the ordinary cache in the model's dtype. Speed is greedy
decoding after a prompt through transformers, which dequantizes a layer's keys and values on every step: it shows what this cache costs
there, not what a server with INT8 attention kernels gains.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint
from pipeline.headers import read_json
from pipeline.stage import Context, find_stage
from stages.functional.bootstrap import Interval, paired_bootstrap
from stages.runtime.int8_cache import Int8Cache, load_cache
from stages.runtime.loading import load_model
from stages.runtime.tensors import CheckpointWriter, TensorReader, copy_companions
from stages.runtime.text import calibration_windows, load_tokenizer

ASSETS = Path(__file__).parent.parent / "assets"
COST = "{:<16} {:>11} {:>8} {:>10}"
QUALITY = "{:<16} {:>6} {:>11} {:>38} {:>30}"


def run_stage(name: str, output: Path, params: dict[str, Any], *inputs: Any) -> Any:
    return find_stage(name).from_dict(params).run(Context(output, lambda event: None), *inputs)


def quality(report: Path) -> tuple[Interval, Interval]:
    """Of the INT8 cache against the ordinary one: change of nll per token, and KL divergence per token."""
    rows = json.loads((report / "report.json").read_text())["documents"]
    column = {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in rows[0]
        if name != "id" and rows[0][name] is not None
    }
    divergence = column["plain_cache_kl"]
    return (
        paired_bootstrap(column["nll"], column["plain_cache_nll"], column["tokens"]),
        paired_bootstrap(divergence, torch.zeros_like(divergence), column["tokens"]),
    )


def new_cache(model: Any, folder: Path | None) -> Any:
    return DynamicCache(config=model.config) if folder is None else load_cache(folder, model.config)


@torch.inference_mode()
def decode_seconds(model: Any, prompt: torch.Tensor, tokens: int, cache: Any) -> float:
    """Greedy decoding of `tokens` tokens after `prompt` [rows, length], which is not timed."""
    state = {"past_key_values": cache, "use_cache": True}
    token = model(prompt, **state).logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(tokens):
        token = model(token, **state).logits.argmax(-1)
    return time.perf_counter() - started


def speed(model: Any, prompt: torch.Tensor, tokens: int, folders: dict[str, Path | None], repeats: int) -> dict[str, float]:
    """Tokens per second of each cache (None: the ordinary one): the fastest of `repeats` runs, since other work can only slow one down."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for repeat in range(repeats + 1):
        for name, folder in folders.items():
            took = decode_seconds(model, prompt, tokens, new_cache(model, folder))
            seconds[name] += [took] if repeat else []  # the first is for warming up
    return {name: prompt.shape[0] * tokens / min(times) for name, times in seconds.items()}


@torch.inference_mode()
def cache_bytes(model: Any, folder: Path | None, tokens: int) -> int:
    """Held by the cache for one sequence of `tokens` tokens; None is the ordinary cache."""
    cache = new_cache(model, folder)
    model(torch.zeros(1, tokens, dtype=torch.int64), past_key_values=cache, use_cache=True)
    if isinstance(cache, Int8Cache):
        return cache.nbytes
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))


def fp32_copy(source: Path, target: Path) -> DenseCheckpoint:
    reader = TensorReader(source)
    with CheckpointWriter(target, {name: ("F32", entry.shape) for name, entry in reader.table.items()}) as writer:
        for name in reader.table:
            writer.add(name, reader.read(name).float())
    copy_companions(source, target, read_json(source / "config.json") | {"dtype": "float32"})
    return DenseCheckpoint(target)


def cached(source: Checkpoint, calibration: Dataset, folder: Path) -> dict[str, Checkpoint]:
    """By mode."""
    return {mode: run_stage("kv_cache", folder / mode, {"mode": mode}, source, calibration) for mode in ("per_token_head", "static")}


def print_quality(made: dict[str, Checkpoint], text: Dataset, params: dict[str, Any], dtype: str) -> None:
    for mode, checkpoint in made.items():
        report = checkpoint.path.with_suffix(".report")
        metrics = run_stage("evaluate", report, params, checkpoint, text).metrics
        change, divergence = quality(report)
        percent = change.perplexity_change_pct
        told = f"{percent.estimate:+.4f} [{percent.low:+.4f}, {percent.high:+.4f}] %{' tie' if percent.is_tie else ''}"
        kl = f"{divergence.estimate:.1e} [{divergence.low:.1e}, {divergence.high:.1e}]"
        print(QUALITY.format(mode, dtype, f"{metrics['perplexity']:.4f}", told, kl), flush=True)


def print_cost(model: Any, made: dict[str, Checkpoint], prompt: torch.Tensor, tokens: int, repeats: int) -> None:
    folders = {"ordinary": None} | {mode: checkpoint.path for mode, checkpoint in made.items()}
    rates, before = speed(model, prompt, tokens, folders, repeats), cache_bytes(model, None, prompt.shape[1])
    for name, folder in folders.items():
        size = cache_bytes(model, folder, prompt.shape[1])
        print(COST.format(name, f"{size:,}", f"{size / before:.3f}", f"{rates[name]:.0f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--calibration", type=Path, default=ASSETS / "data/calibration.jsonl")
    parser.add_argument("--eval", type=Path, default=ASSETS / "data/eval.jsonl")
    parser.add_argument("--max-documents", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=256, help="tokens before decoding starts")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded")
    parser.add_argument("--batch", type=int, default=4, help="sequences decoded at once")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source, text, calibration = DenseCheckpoint(options.model), Dataset(options.eval), Dataset(options.calibration)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        made = cached(source, calibration, scratch / "own")
        prompt = calibration_windows(text, load_tokenizer(options.model), options.batch, options.prompt)
        print(COST.format("cache", "bytes", "ratio", "tokens/s"))
        print_cost(load_model(options.model), made, prompt, options.tokens, options.repeats)
        print()
        print(QUALITY.format("cache", "dtype", "perplexity", "change", "KL (nats)"))
        params = {"max_documents": options.max_documents}
        print_quality(made, text, params, source.model_spec.dtype.lower())
        print_quality(cached(fp32_copy(options.model, scratch / "fp32"), calibration, scratch / "in32"), text, params, "f32")


if __name__ == "__main__":
    main()
