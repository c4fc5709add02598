"""What the stage gptq costs beside the llm-compressor script that most people write: CPU seconds and peak memory of whole processes.

    python bench/gptq.py [--model FOLDER] [--samples 128] [--length 256] [--repeats 3]

Both quantize the small model to 4 bits in groups of 128, from the same windows of the same text in the same batches; the script in the
dtype that the stage computes in and, beside it, in the one that it would take by itself (the checkpoint's, bf16). The stage also proves
that what it wrote loads and computes, and hashes it. They take turns, and medians are told. `CPU` and `peak` are of the whole process,
its imports included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.processor import processor

ASSETS = Path(__file__).parents[1] / "assets"
BATCH = 8
ROW = "{:<6} {:<28} {:>8} {:>10} {:>10} {:>10}"


def stage(model: Path, output: Path, dtype: str, samples: int, length: int) -> None:
    from pipeline.artifact import Dataset, DenseCheckpoint
    from pipeline.stage import Context, find_stage
    from stages.runtime.guard import check_checkpoint

    params = {"num_samples": samples, "max_length": length, "compute_dtype": dtype}
    made = (
        find_stage("gptq")
        .from_dict(params, {"batch_size": BATCH})
        .run(Context(output, lambda event: None), model=DenseCheckpoint(model), calibration=Dataset(ASSETS / "data/calibration.jsonl"))
    )
    check_checkpoint(made.path, made.model_spec)


def script(model: Path, output: Path, dtype: str, samples: int, length: int) -> None:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=chosen), AutoTokenizer.from_pretrained(model)
    rows = (ASSETS / "data/calibration.jsonl").read_text().splitlines()
    ids = [token for row in rows for token in tokenizer(json.loads(row)["text"])["input_ids"]]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    windows = windows[torch.arange(samples) * len(windows) // samples]
    oneshot(
        model=loaded,
        tokenizer=tokenizer,
        recipe=[GPTQModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"], actorder="static")],
        dataset=DataLoader([{"input_ids": row} for row in windows], batch_size=BATCH),  # type: ignore[arg-type]
        num_calibration_samples=samples,
        pipeline="sequential",
    )
    loaded.save_pretrained(output, save_compressed=True)


def measured(way: str, dtype: str, options: argparse.Namespace) -> tuple[float, float]:
    """CPU seconds and peak bytes of a process that does it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--way", way, "--dtype", dtype, "--output", f"{folder}/made", "--model", str(options.model)]
        command += ["--samples", str(options.samples), "--length", str(options.length)]
        environment = {**os.environ, "PYTHONPATH": str(ASSETS.parent), "OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return cpu, peak


def compare(options: argparse.Namespace) -> None:
    print(f"{processor()}; {options.samples} windows of {options.length} tokens, median of {options.repeats}")
    print(ROW.format("dtype", "", "CPU s", "peak", "CPU ratio", "peak ratio"))
    for dtype in options.dtypes:
        ways = {"stage": ("stage", dtype), "script, same dtype": ("script", dtype)}
        if dtype != "bf16":
            ways["script, its default (bf16)"] = ("script", "bf16")
        rows: dict[str, list[tuple[float, float]]] = {label: [] for label in ways}
        for label in [*ways] * options.repeats:
            rows[label].append(measured(*ways[label], options))
        found = {label: tuple(median(column) for column in zip(*each, strict=True)) for label, each in rows.items()}
        for label, (cpu, peak) in found.items():
            ratios = [f"{ours / theirs:.2f}" for ours, theirs in zip(found["stage"], (cpu, peak), strict=True)]
            print(ROW.format(dtype, label, f"{cpu:.1f}", f"{peak / 1e6:.0f} MB", *(ratios if label != "stage" else ("", ""))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    for hidden in ("--way", "--dtype", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.way:
        compare(options)
        return
    {"stage": stage, "script": script}[options.way](options.model, Path(options.output), options.dtype, options.samples, options.length)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))


if __name__ == "__main__":
    main()
