"""What a plan says a stage takes on this machine, and what it takes.

    OMP_NUM_THREADS=1 python bench/stage_hours.py [--stages gptq distill] [--samples 128] [--utilisation 0.4] 2> log

Measures the machine first and prints it as settings that a recipe takes. Each stage then runs on the small model, or another one, as
a worker would run it: with the proof of its checkpoint and the digests of its files, without starting up. `cpu` is what the process
computed: where others share a CPU, that of one thread is the time that it would have taken alone.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmcompressor  # noqa: F401  # imported here so that no stage is charged for it
import torch
from loguru import logger

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.hashed import known_below
from pipeline.roofline import UTILISATION, seconds
from pipeline.spec import ModelSpec
from pipeline.stage import Context, find_stage
from pipeline.store import file_records
from pipeline.target import Target
from stages.runtime.guard import check_checkpoint

ASSETS = Path(__file__).parent.parent / "assets"
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product shows the FLOP/s: small enough to be left alone on a shared CPU
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes
FILE = 1 << 28  # bytes
ROW = "{:<17} {:>9} {:>9} {:>9} {:>17} {:>12}"


def fastest(call: Callable[[], object], times: int = 30) -> float:
    """Seconds of the fastest call of several, the first not counted."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def measure(folder: Path) -> Target:
    """This machine: a product in bf16, a copy within memory, a file written through to the disk and read (from the system's cache)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, copied = SIDE[device], COPIED[device]
    matrix = torch.randn(side, side, device=device).bfloat16()
    flops = 2 * side**3 / fastest(lambda: matrix @ matrix)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / fastest(lambda: target.copy_(source))
    file, content = folder / "file", bytes(FILE)

    def write_and_read() -> None:
        with open(file, "wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())
        file.read_bytes()

    disk = 2 * FILE / fastest(write_and_read, 2)
    gpus, cores = int(device == "cuda"), torch.get_num_threads()
    return Target(name="measured", gpus=gpus, cores=cores, flops=flops, bandwidth=bandwidth, disk_bandwidth=disk)


def split(name: str) -> Dataset:
    file = ASSETS / f"data/{name}.jsonl"
    return Dataset(file, DatasetSpec(split=name, file_format="jsonl", digest=name, nbytes=file.stat().st_size))


def run_stage(name: str, params: dict[str, Any], output: Path, machine: Target, utilisation: float, inputs: dict[str, Artifact]) -> Any:
    """Run it, print its row, and return what it made."""
    stage = find_stage(name).from_dict(params)
    specs = {port: artifact.spec for port, artifact in inputs.items()}
    work = stage.work(**specs)
    assert work is not None, f"{name} says its work"
    planned = seconds(work, machine if stage.on_gpu(machine) else machine.without_gpus(), utilisation)
    output.mkdir()
    started, computed = time.perf_counter(), time.process_time()
    made = stage.run(Context(output, lambda event: None), **inputs)
    for artifact in (made, getattr(made, "model", None)):
        if isinstance(artifact, Checkpoint):
            check_checkpoint(artifact.path, artifact.model_spec)
    file_records(output, known_below(output))
    wall, cpu = time.perf_counter() - started, time.process_time() - computed
    assert planned is not None, "both peaks were measured"
    ratios = f"{planned / wall:.2f}", f"{planned / cpu:.2f}"
    print(ROW.format(name, f"{planned:.2f} s", f"{wall:.2f} s", f"{cpu:.2f} s", *ratios), flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--stages", nargs="+", help="only these; dequantize comes with rtn")
    parser.add_argument("--samples", type=int, default=128, help="windows of 256 tokens that are calibrated with or trained on")
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    options = parser.parse_args()
    logger.disable("llmcompressor")  # it reports every layer on stdout, where the table goes
    spec = ModelSpec.from_config(json.loads((options.model / "config.json").read_text()))
    model, calibration, train = DenseCheckpoint(options.model, spec), split("calibration"), split("train")
    windows = {"num_samples": options.samples, "max_length": 256}
    rows: list[tuple[str, dict[str, Any], dict[str, Artifact]]] = [
        ("evaluate", {}, {"model": model, "eval": split("eval"), "reference": model}),
        ("structured_prune", {"mlp_ratio": 0.5, "round_to": 128}, {"model": model}),
        ("teacher_logits", windows, {"teacher": model, "train": train}),
        ("distill", {**windows, "global_batch_size": 8}, {"student": model, "train": train, "teacher": model}),
        ("qlora", {**windows, "global_batch_size": 8}, {"model": model, "train": train}),
        ("rtn", {}, {"model": model}),
        ("gptq", windows, {"model": model, "calibration": calibration}),
        ("awq", windows, {"model": model, "calibration": calibration}),
        ("kv_cache", {"mode": "static", **windows}, {"model": model, "calibration": calibration}),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = measure(folder)
        assert machine.flops and machine.bandwidth, "both were measured"
        rates = f"target.bandwidth={machine.bandwidth / 1e9:.3g}GB/s target.disk_bandwidth={machine.disk_bandwidth / 1e9:.3g}GB/s"
        print(f"target.flops={machine.flops / 1e9:.3g}GFLOP/s {rates} target.cores={machine.cores}\n")
        print(ROW.format("stage", "planned", "measured", "cpu", "planned/measured", "planned/cpu"))
        for stage, params, inputs in rows:
            if not options.stages or stage in options.stages:
                made = run_stage(stage, params, folder / stage, machine, options.utilisation, inputs)
                if stage == "rtn":
                    run_stage("dequantize", {}, folder / "dequantize", machine, options.utilisation, {"model": made})


if __name__ == "__main__":
    main()
