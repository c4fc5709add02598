"""How much memory and time streaming costs: prune a random 1 B checkpoint, up to the record of its files, against copying
its bytes, and the activation sweep against the resident model. Every measured run is a process of its own; `above` is peak memory
beyond what that process had when its imports were done.

    python bench/prune.py [--scratch FOLDER] [--repeats 3] [--tokens 2048]     no sweep with --tokens 0

Needs about 5 GB of disk. The model is random: this measures cost, not quality. A copy is made first that does not count, since
memory that a virtual machine never used costs it several times as much to touch.
"""

import argparse
import hashlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.processor import processor
from pipeline.library_defaults import LIBRARY_DEFAULTS

SEQUENCE = 256
LAZY_IMPORT = "transformers.models.llama.modeling_llama"  # transformers imports a family when it is used
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
PARAMS = {"num_kv_heads": 6, "intermediate_size": 6144}


def make_checkpoint(folder: Path, _: Path, __: int) -> None:
    import torch

    from pipeline.spec import ModelSpec
    from stages.runtime.tensors import CheckpointWriter

    generator = torch.Generator().manual_seed(0)
    tensors = ModelSpec.from_config(CONFIG).tensors()
    with CheckpointWriter(folder, tensors, shard_bytes=200_000_000) as writer:
        for name, (_, shape) in tensors.items():
            weight = torch.empty(shape, dtype=torch.bfloat16)
            writer.add(name, weight.fill_(1.0) if len(shape) == 1 else weight.normal_(0, 0.02, generator=generator))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def prune_by_magnitude(source: Path, target: Path, _: int) -> None:
    from pipeline.artifact import DenseCheckpoint
    from pipeline.hashed import known_below
    from pipeline.stage import Context
    from pipeline.store import file_records
    from stages.runtime.guard import check_checkpoint
    from stages.structured_prune import StructuredPrune

    importlib.import_module("stages.runtime.pruning")  # what run() imports by itself
    imports_done()
    target.mkdir()
    made = StructuredPrune.from_dict(PARAMS).run(Context(target, lambda event: None), DenseCheckpoint(source))
    check_checkpoint(target, made.model_spec)
    file_records(target, known_below(target))


def hash_the_source(source: Path, _: Path, __: int) -> None:
    """As a run does before the first stage that reads it, where it is not remembered."""
    from pipeline.identity import DigestMemo, model_files

    imports_done()
    DigestMemo(source / "memo").compute_all(list(model_files(source).values()))


def sweep_activations(source: Path, _: Path, tokens: int) -> None:
    from stages.runtime.activations import measure_activations

    windows = random_windows(tokens)
    importlib.import_module(LAZY_IMPORT)
    imports_done()
    measure_activations(source, windows, lambda done, total: None)


def run_resident(source: Path, _: Path, tokens: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from stages.runtime.layerwise import micro_batches

    logging.disable_progress_bar()
    windows = random_windows(tokens)
    importlib.import_module(LAZY_IMPORT)
    imports_done()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    with torch.no_grad():
        for ids in micro_batches(windows):
            model.model(ids, use_cache=False)


def random_windows(tokens: int) -> Any:
    import torch

    return torch.randint(CONFIG["vocab_size"], (tokens // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(0))


JOBS = {job.__name__: job for job in (make_checkpoint, prune_by_magnitude, hash_the_source, sweep_activations, run_resident)}
after_imports: dict[str, float] = {}


def imports_done() -> None:
    after_imports.update(usage())


def usage() -> dict[str, float]:
    """`peak` in bytes is of this program alone; ru_maxrss would count the process that it was forked from."""
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": peak, "cpu": time.process_time(), "wall": time.perf_counter()}


def run_job(job: str, source: Path, target: Path, tokens: int) -> dict[str, float]:
    """Run one job in a fresh process; what it took in all, and since its imports."""
    command = [sys.executable, __file__, "--job", job, "--source", str(source), "--target", str(target), "--tokens", str(tokens)]
    environment = os.environ | LIBRARY_DEFAULTS | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = timed(command, environment)
    return result | json.loads(str(result.pop("output")))


def timed(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    os.sync()
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "output": output or "{}"}


def print_job(job: str, source: Path, target: Path, tokens: int) -> None:
    JOBS[job](source, target, tokens)
    end, floor = usage(), after_imports or usage()
    above = {"above": end["peak"] - floor["peak"], "work_cpu": end["cpu"] - floor["cpu"], "work_wall": end["wall"] - floor["wall"]}
    print(json.dumps(above | {"floor": floor["peak"]}))


def sha256_seconds() -> float:
    """CPU seconds a GB, which is the floor of whatever hashes."""
    block, started = bytes(1 << 20), time.process_time()
    digest = hashlib.sha256()
    for _ in range(256):
        digest.update(block)
    return (time.process_time() - started) / (256 * len(block) / 1e9)


def compare(scratch: Path, repeats: int, tokens: int) -> None:
    source, target = scratch / "source", scratch / "target"
    run_job("make_checkpoint", source, target, tokens)
    size = sum(file.stat().st_size for file in source.iterdir())
    print(f"{processor()}; source {size / 1e9:.2f} GB, kept {PARAMS}")
    print(f"sha256 of bytes in cache: {sha256_seconds():.2f} CPU s/GB\n")
    timed(["cp", "-r", str(source), str(target)])
    shutil.rmtree(target)
    copies, prunes, hashes = [], [], []
    print("                       wall s   cpu s   since imports: wall s   cpu s   peak MB above the imports' (their own)")
    for _ in range(repeats):
        copies.append(timed(["cp", "-r", str(source), str(target)]))
        print(f"cp -r                  {copies[-1]['wall']:6.2f}  {copies[-1]['cpu']:6.2f}")
        shutil.rmtree(target)
        prunes.append(run_job("prune_by_magnitude", source, target, tokens))
        print_row("prune by magnitude", prunes[-1])
        written = sum(file.stat().st_size for file in target.iterdir())
        shutil.rmtree(target)
        hashes.append(run_job("hash_the_source", source, target, tokens))
        print_row("hash the source", hashes[-1])
    for kind, wall, cpu in (("with imports", "wall", "cpu"), ("since imports", "work_wall", "work_cpu")):
        ratio = {name: median(p[key] for p in prunes) / median(c[name] for c in copies) for name, key in (("wall", wall), ("cpu", cpu))}
        print(f"prune / cp, {kind}: wall {ratio['wall']:.2f}x, cpu {ratio['cpu']:.2f}x (medians)")
    rates = {name: median(row[key] for row in rows) / (size / 1e9) for name, key, rows in (
        ("cp", "cpu", copies), ("prune", "work_cpu", prunes), ("hash the source", "work_cpu", hashes)
    )}  # fmt: skip
    print("CPU s per GB of the source, since imports: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    print(f"of prune, sha256 of the {written / 1e9:.2f} GB written: {written / size * sha256_seconds():.2f}")
    if not tokens:
        return
    print_row(f"sweep {tokens} tokens", run_job("sweep_activations", source, target, tokens))
    print_row("resident, the same", run_job("run_resident", source, target, tokens))


def print_row(label: str, row: dict[str, float]) -> None:
    print(
        f"{label:22} {row['wall']:6.2f}  {row['cpu']:6.2f}                  {row['work_wall']:6.2f}  {row['work_cpu']:6.2f}"
        f"   {row['above'] / 1e6:7.0f} ({row['floor'] / 1e6:.0f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help=f"of the activation sweep, in windows of {SEQUENCE}")
    for hidden in ("--job", "--source", "--target"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print_job(args.job, Path(args.source), Path(args.target), args.tokens)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench-prune-") as scratch:
        compare(Path(scratch), args.repeats, args.tokens)


if __name__ == "__main__":
    main()
