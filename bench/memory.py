"""Is the peak memory that a plan predicts the one that is measured? Every stage, on random Llamas of 300 million and 1 billion weights.

    python bench/memory.py [--sizes 300M 1B] [--stages rtn gptq ...] [--scratch FOLDER] [--vocab-size 4096] [--phases]

Each row is a process of its own, one after the other, on the CPU. It runs its stage twice: first on a model of a few tiny layers, which
imports everything that the stage uses, also what libraries only import when they are called; the resident memory after that is the
floor. Then it runs on the model, and the highest resident memory above the floor is what a plan's `ram` has to be. Mapped file pages count.

A model has the tokenizer of assets/small-llama, whose text it reads; it is random, so this measures cost, not quality. `--vocab-size`
adds rows to its embeddings that no text reaches. Needs 10 GB of disk, and for 1B 20 GB of RAM (training every weight in float32).
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec, LogitsSpec
from pipeline.companions import companion_files
from pipeline.library_defaults import set_library_defaults
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage, find_stage
from pipeline.target import Memory, Target

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
SMALL = ASSETS / "small-llama"
SIZES = {  # hidden_size, intermediate_size, layers, heads, KV heads; the first is what the imports are for
    "tiny": (512, 1024, 5, 8, 4),
    "300M": (1024, 4096, 20, 16, 4),
    "1B": (2048, 8192, 16, 32, 8),
}
ROW = "| {:<5} | {:<34} | {:>12} | {:>11} | {:>18} | {:>7} |"


@dataclass(frozen=True)
class Row:
    """One measurement. `inputs` are ports: `dense`, or another row's name, is that model or its output; else a split of the text."""

    stage: str
    params: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=lambda: {"model": "dense"})
    sizes: tuple[str, ...] = ("300M", "1B")

    def configured(self) -> Stage:
        return find_stage(self.stage).from_dict(self.params, self.execution)


WINDOWS = {"num_samples": 16, "max_length": 256}
TWO_LAYERS = {  # are quantized: a layer's peak is the same however many come after it
    "num_samples": 8, "max_length": 256, "ignore": ["lm_head", r"re:model\.layers\.(?![01]\.)"],
}  # fmt: skip
CALIBRATED = {"model": "dense", "calibration": "calibration"}
LESS = {"gradient_checkpointing": True}
TRAINING = {"num_samples": 8, "max_length": 256, "global_batch_size": 4, "warmup_ratio": 0.0}
EVALUATION = {"max_length": 256}
CUT = {"head_ratio": 0.25, "mlp_ratio": 0.25}
ROWS = {
    "structured_prune, magnitude": Row("structured_prune", CUT),
    "structured_prune, activation": Row("structured_prune", {**CUT, "importance": "activation", **WINDOWS}, inputs=CALIBRATED),
    "rtn": Row("rtn"),
    "dequantize": Row("dequantize", inputs={"model": "rtn"}),
    "gptq": Row("gptq", TWO_LAYERS, inputs=CALIBRATED),
    "gptq, offload disk": Row("gptq", TWO_LAYERS, {"offload": "disk"}, CALIBRATED),
    "awq": Row("awq", {**TWO_LAYERS, "n_grid": 3}, inputs=CALIBRATED),
    "awq, offload disk": Row("awq", {**TWO_LAYERS, "n_grid": 3}, {"offload": "disk"}, CALIBRATED),
    "kv_cache, static": Row("kv_cache", {"mode": "static", **WINDOWS}, inputs=CALIBRATED),
    "teacher_logits": Row("teacher_logits", {"num_samples": 8, "max_length": 256}, inputs={"teacher": "dense", "train": "train"}),
    "teacher_logits, layerwise": Row("teacher_logits", WINDOWS, {"mode": "layerwise"}, {"teacher": "dense", "train": "train"}),
    "distill, stored logits": Row(
        "distill", TRAINING, {"micro_batch_size": 2, **LESS}, {"student": "dense", "train": "train", "teacher": "teacher_logits"}
    ),
    "distill, online teacher": Row(
        "distill", TRAINING, {"micro_batch_size": 4}, {"student": "dense", "train": "train", "teacher": "dense"}, ("300M",)
    ),
    "distill, lora, online teacher": Row(
        "distill", {**TRAINING, "method": "lora"}, {"micro_batch_size": 4}, {"student": "dense", "train": "train", "teacher": "dense"}
    ),
    "qlora": Row("qlora", TRAINING, {"micro_batch_size": 4}, {"model": "dense", "train": "train"}),
    "qlora, gradient checkpointing": Row("qlora", TRAINING, {"micro_batch_size": 4, **LESS}, {"model": "dense", "train": "train"}),
    "evaluate": Row("evaluate", EVALUATION, inputs={"model": "dense", "eval": "eval"}),
    "evaluate, packed": Row("evaluate", EVALUATION, inputs={"model": "rtn", "eval": "eval"}),
    "evaluate, packed and reference": Row("evaluate", EVALUATION, inputs={"model": "rtn", "eval": "eval", "reference": "dense"}),
    "evaluate, layerwise": Row("evaluate", EVALUATION, {"mode": "layerwise"}, {"model": "dense", "eval": "eval"}),
    "evaluate, layerwise packed": Row("evaluate", EVALUATION, {"mode": "layerwise"}, {"model": "rtn", "eval": "eval"}),
}  # fmt: skip


def config(size: str, vocab_size: int) -> dict[str, Any]:
    hidden, inner, layers, heads, kv_heads = SIZES[size]
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 2048, "vocab_size": vocab_size, "tie_word_embeddings": False,
    }  # fmt: skip
    return json.loads((SMALL / "config.json").read_text()) | sizes


def make_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Of weights drawn at random, in bf16."""
    import torch

    from stages.runtime.tensors import CheckpointWriter

    generator = torch.Generator().manual_seed(0)
    tensors = ModelSpec.from_config(content).tensors()
    with CheckpointWriter(folder, tensors) as writer:
        for name, (_, shape) in tensors.items():
            weight = torch.empty(shape, dtype=torch.bfloat16)
            writer.add(name, weight.fill_(1.0) if len(shape) == 1 else weight.normal_(0, 0.02, generator=generator))
    (folder / "config.json").write_text(json.dumps(content))
    for file in companion_files(SMALL):
        shutil.copy(file, folder)


def specs(row: Row, dense: ModelSpec) -> dict[str, Any]:
    """What a plan would know of the row's inputs."""
    return {port: spec_of(name, dense) for port, name in row.inputs.items()}


def spec_of(name: str, dense: ModelSpec) -> ModelSpec | DatasetSpec | LogitsSpec:
    if name == "dense":
        return dense
    if name in ROWS:
        made: ModelSpec | LogitsSpec = ROWS[name].configured().infer(**specs(ROWS[name], dense))
        return made
    return DatasetSpec(split=name, digest=name, nbytes=len(text(name)))


def text(split: str) -> bytes:
    """Of a split of assets/data, of which one document is evaluated."""
    content = (ASSETS / f"data/{split}.jsonl").read_bytes()
    return content.partition(b"\n")[0] if split == "eval" else content


def predict(row: Row, dense: ModelSpec) -> Memory:
    return row.configured().memory(**specs(row, dense), target=Target(name="cpu"))


def run_stage(name: str, place: Path, output: Path, emit: Callable[[dict[str, Any]], None]) -> None:
    """The row's stage on the model in `place`, whose `dense` and outputs of other rows are folders named like them."""
    row = ROWS[name]
    spec = ModelSpec.from_config(json.loads((place / "dense/config.json").read_text()))
    stage, inputs = row.configured(), {}
    for port, given in row.inputs.items():
        path = place / given if given == "dense" or given in ROWS else place.parent / f"{given}.jsonl"
        inputs[port] = type_of(given)(path, spec_of(given, spec))
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    stage.run(Context(output, emit), **inputs)


def type_of(name: str) -> type[Artifact]:
    if name == "dense":
        return DenseCheckpoint
    return next(iter(ROWS[name].configured().outputs().values())).accepts[0] if name in ROWS else Dataset


def memory_now(field_name: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field_name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Phases:
    """The peak within each label of a stage's progress, in their order."""

    def __init__(self) -> None:
        self.label, self.peaks = "at first", dict[str, int]()

    def emit(self, event: dict[str, Any]) -> None:
        label = event.get("label", event["event"])
        if label != self.label:
            self.close(label)

    def close(self, label: str = "") -> None:
        self.peaks[self.label] = max(self.peaks.get(self.label, 0), memory_now("VmHWM"))
        reset_peak()
        self.label = label


def measure(name: str, scratch: Path, size: str) -> None:
    """In a process of its own: run the row and print what it took above the floor."""
    run_stage(name, scratch / "tiny", scratch / "tiny" / name, lambda event: None)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    floor, phases, started = memory_now(), Phases(), time.perf_counter()
    reset_peak()
    run_stage(name, scratch / size, scratch / size / name, phases.emit)
    phases.close()
    above = {label: peak - floor for label, peak in phases.peaks.items()}
    print(json.dumps({"floor": floor, "above": max(above.values()), "phases": above, "seconds": time.perf_counter() - started}))


def in_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def needed(name: str) -> Iterator[str]:
    """The rows whose outputs it reads, in the order in which they can be run."""
    for given in ROWS[name].inputs.values():
        if given in ROWS:
            yield from needed(given)
            yield given


def compare(scratch: Path, size: str, names: list[str], vocab_size: int, show_phases: bool) -> None:
    place, kept = scratch / size, {given for name in names for given in needed(name)}
    for split in ("calibration", "eval", "train"):
        (scratch / f"{split}.jsonl").write_bytes(text(split))
    for each in ("tiny", size):
        in_child("--make", str(scratch / each / "dense"), "--size", each, "--vocab-size", str(vocab_size))
    dense = ModelSpec.from_config(config(size, vocab_size))
    for name in names:
        for given in (*needed(name), name):
            if given != name and (place / given).exists():
                continue
            found = in_child("--row", given, "--scratch", str(scratch), "--size", size)
            if given not in kept:
                shutil.rmtree(place / given)
            if given == name:
                print_row(size, name, predict(ROWS[name], dense), found, show_phases)
    shutil.rmtree(place)


def print_row(size: str, name: str, predicted: Memory, found: Mapping[str, Any], show_phases: bool) -> None:
    planned, above = predicted.totals["ram"], found["above"]
    sizes = (f"{count / 1e6:,.0f}" for count in (planned, above, found["floor"]))
    print(ROW.format(size, name, *sizes, f"{planned / above:.2f}"), flush=True)
    if show_phases:
        print(f"    planned   {itemised(predicted.ram)}\n    measured  {itemised(found['phases'])}; {found['seconds']:.0f} s", flush=True)


def itemised(items: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count / 1e6:.0f}" for name, count in items.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["300M", "1B"], choices=[size for size in SIZES if size != "tiny"])
    parser.add_argument("--stages", nargs="+", default=list(ROWS), help="stages (all of its rows) or names of rows")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (default: a temporary one)")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--phases", action="store_true", help="also the items of the prediction, and the peak of each phase, in MB")
    for hidden in ("--make", "--row", "--size"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(Path(options.make), config(options.size, options.vocab_size))
        print("{}")
        return
    if options.row:
        measure(options.row, options.scratch, options.size)
        return
    set_library_defaults()
    chosen = [name for name, row in ROWS.items() if name in options.stages or row.stage in options.stages]
    print(ROW.format("size", "stage", "predicted MB", "measured MB", "(import floor MB)", "ratio"))
    print("|" + "---|" * 6)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-memory-") as scratch:
        for size in options.sizes:
            compare(Path(scratch), size, [name for name in chosen if size in ROWS[name].sizes], options.vocab_size, options.phases)


if __name__ == "__main__":
    main()
