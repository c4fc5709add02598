"""What distillation costs beside the loop most people write: transformers' Trainer with a `compute_loss` over whole logits.

    python bench/distill.py [--dtype fp32] [--windows 48] [--repeats 2] [--words 128256] [--tokens 1024]

The shipped model teaches itself with half its MLP pruned away, in windows of 512 tokens and micro batches of 8 in batches of 16, in the
dtype that this processor multiplies fastest or the one that is given (bf16: autocast). Each measured run is a process of its own, on as
many cores as OMP_NUM_THREADS says; tokens per CPU second are what to compare on a machine that others use. Then the loss alone at a large
vocabulary: its peak memory above what the process had.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.processor import processor
from pipeline.compute_dtype import processor_dtype

ASSETS = Path(__file__).parents[1] / "assets"
LENGTH, MICRO, BATCH, TEMPERATURE, ALPHA, K = 512, 8, 16, 2.0, 0.7, 32
HIDDEN = 512  # of the loss measured alone


def prepare(scratch: Path, windows: int) -> None:
    from pipeline.artifact import DenseCheckpoint
    from stages.structured_prune import StructuredPrune
    from stages.teacher_logits import RecordTeacher

    settings = {"mlp_ratio": 0.5, "round_to": 128}
    StructuredPrune.from_dict(settings).run(context(scratch / "student"), DenseCheckpoint(ASSETS / "small-llama"))
    record = RecordTeacher.from_dict({"num_samples": windows, "max_length": LENGTH, "k": K, "temperature": TEMPERATURE})
    record.run(context(scratch / "logits"), DenseCheckpoint(ASSETS / "small-llama"), text())


def context(folder: Path) -> Any:
    from pipeline.stage import Context

    folder.mkdir(exist_ok=True)
    return Context(folder, lambda event: None)


def text() -> Any:
    from pipeline.artifact import Dataset
    from pipeline.artifact_spec import DatasetSpec

    file = ASSETS / "data" / "train.jsonl"
    return Dataset(file, DatasetSpec(split="train", digest="0", nbytes=file.stat().st_size))


def run_stage(scratch: Path, windows: int, dtype: str, teacher: Any, alpha: float = ALPHA) -> dict[str, float]:
    from pipeline.artifact import DenseCheckpoint
    from stages.distill import Distill

    params = {"num_samples": windows, "max_length": LENGTH, "global_batch_size": BATCH, "alpha": alpha, "compute_dtype": dtype}
    stage = Distill.from_dict(params, {"micro_batch_size": MICRO, "device": "cpu"})
    clock: dict[int, float] = {}

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["label"] == "training":
            clock[event["done"]] = time.process_time()

    ctx = context(scratch / f"out-{os.getpid()}")
    made = stage.run(type(ctx)(ctx.output, watch), DenseCheckpoint(scratch / "student"), text(), teacher)
    return rate(clock) | {"loss": made.metrics["train_loss"]}


def distill_online(scratch: Path, windows: int, dtype: str) -> dict[str, float]:
    from pipeline.artifact import DenseCheckpoint

    return run_stage(scratch, windows, dtype, DenseCheckpoint(ASSETS / "small-llama"))


def distill_stored(scratch: Path, windows: int, dtype: str) -> dict[str, float]:
    from pipeline.artifact import TeacherLogits

    return run_stage(scratch, windows, dtype, TeacherLogits(scratch / "logits"))


def distill_without_teacher(scratch: Path, windows: int, dtype: str) -> dict[str, float]:
    return run_stage(scratch, windows, dtype, None, alpha=0.0)


def rate(clock: dict[int, float]) -> dict[str, float]:
    """From the end of the first update to that of the last, in CPU seconds of this process."""
    return {"tokens_per_cpu_second": (len(clock) - 1) * BATCH * LENGTH / (clock[max(clock)] - clock[min(clock)])}


def plain_trainer(scratch: Path, windows: int, dtype: str, with_teacher: bool) -> dict[str, float]:
    """The model's own loss, or a `compute_loss` over both models' whole logits."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from stages.runtime.text import calibration_windows, load_tokenizer

    clock: dict[int, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock[state.global_step] = time.process_time()

    class Distiller(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            student = model(**inputs)
            with torch.no_grad():
                expected = teacher(input_ids=inputs["input_ids"]).logits
            kl = functional.kl_div(
                functional.log_softmax(student.logits.float() / TEMPERATURE, -1),
                functional.log_softmax(expected.float() / TEMPERATURE, -1),
                log_target=True,
                reduction="batchmean",
            )
            return ALPHA * TEMPERATURE**2 * kl / LENGTH + (1 - ALPHA) * student.loss

    student = AutoModelForCausalLM.from_pretrained(scratch / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(
        ASSETS / "small-llama", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
    ).eval()
    ids = calibration_windows(text(), load_tokenizer(scratch / "student"), windows, LENGTH)
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // MICRO,
        num_train_epochs=1, learning_rate=1e-4, bf16=dtype == "bf16", use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=10**6,
    )  # fmt: skip
    samples: Any = [{"input_ids": row, "labels": row} for row in ids]
    (Distiller if with_teacher else Trainer)(student, arguments, train_dataset=samples, callbacks=[Clock()]).train()
    return rate(clock)


def trainer_cross_entropy(scratch: Path, windows: int, dtype: str) -> dict[str, float]:
    return plain_trainer(scratch, windows, dtype, with_teacher=False)


def trainer_whole_logits(scratch: Path, windows: int, dtype: str) -> dict[str, float]:
    return plain_trainer(scratch, windows, dtype, with_teacher=True)


def loss_memory(words: int, tokens: int, way: str) -> dict[str, float]:
    """Forward and backward of the loss alone from bf16 hidden states and heads; peak above what stood there before, in bytes."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    from stages.functional.distillation import Distillation, FullTeacher, TopTeacher, linear_loss
    from stages.runtime.training_settings import loss_chunk_tokens

    torch.manual_seed(0)
    hidden, head = (torch.randn(n, HIDDEN, dtype=torch.bfloat16).mul_(0.1).requires_grad_() for n in (tokens, words))
    taught, teacher = (tensor.detach().roll(1, 0).clone() for tensor in (hidden, head))
    labels = torch.randint(words, (tokens,))
    for tensor in (hidden, head):
        tensor.grad = torch.zeros_like(tensor)
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # whatever the first product loads
    floor, started = peak(), time.process_time()

    def whole(states: torch.Tensor, guide: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        z, y = (states @ head.T).float(), (guide @ teacher.T).float()
        log_p, log_q = (y / TEMPERATURE).log_softmax(-1), (z / TEMPERATURE).log_softmax(-1)
        kl = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * functional.cross_entropy(z, targets, reduction="sum")

    chunk = loss_chunk_tokens(words)
    if way == "whole":
        loss = whole(hidden, taught, labels)
    elif way == "recomputed":
        pieces = zip(*(tensor.split(chunk) for tensor in (hidden, taught, labels)), strict=True)
        loss = torch.stack([checkpoint(whole, *piece, use_reentrant=False) for piece in pieces]).sum()
    else:
        divergence: Any = FullTeacher(taught, lambda states: states @ teacher.T)
        if way == "chunked, stored":
            ids = torch.randint(words, (tokens, K)).sort(-1).values
            divergence = TopTeacher(ids, torch.zeros(tokens, K), torch.full((tokens,), 12.0))
        loss = linear_loss(hidden, head, Distillation(labels, divergence, TEMPERATURE, ALPHA), chunk)["loss"]
    loss.backward()
    return {"above": peak() - floor, "cpu": time.process_time() - started, "loss": float(loss)}


def peak() -> float:
    (found,) = (int(row.split()[1]) * 1024 for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return found


JOBS = {job.__name__: job for job in (trainer_cross_entropy, trainer_whole_logits, distill_without_teacher, distill_online, distill_stored)}


def in_a_process(*arguments: str) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}
    ran = subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return result


def compare(scratch: Path, dtype: str, windows: int, repeats: int, words: int, tokens: int) -> None:
    in_a_process("--job", "prepare", "--scratch", str(scratch), "--windows", str(windows))
    print(f"{processor()}\n{dtype}, {windows} windows of {LENGTH}, median of {repeats}")
    rows: dict[str, list[float]] = {name: [] for name in JOBS}
    for name in [*JOBS] * repeats:  # in turn, so that what else the machine does falls on all of them
        found = in_a_process("--job", name, "--scratch", str(scratch), "--windows", str(windows), "--dtype", dtype)
        rows[name].append(found["tokens_per_cpu_second"])
    for name, rates in rows.items():
        print(f"{name:26} {median(rates):7.0f} tokens / CPU s", flush=True)
    print(f"\nthe loss alone: {words:,} words, {tokens} tokens, hidden {HIDDEN}, bf16")
    for way in ("whole", "recomputed", "chunked", "chunked, stored"):
        row = in_a_process("--way", way, "--words", str(words), "--tokens", str(tokens))
        print(f"{way:26} {row['above'] / 1e6:7.0f} MB above the floor {row['cpu']:7.2f} CPU s   loss {row['loss']:.6g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default=processor_dtype())
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    for hidden in ("--job", "--way"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(loss_memory(args.words, args.tokens, args.way)))
    elif args.job == "prepare":
        prepare(args.scratch, args.windows)
        print("{}")
    elif args.job:
        print(json.dumps(JOBS[args.job](args.scratch, args.windows, args.dtype)))
    else:
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench-distill-") as scratch:
            compare(Path(scratch), args.dtype, args.windows, args.repeats, args.words, args.tokens)


if __name__ == "__main__":
    main()
