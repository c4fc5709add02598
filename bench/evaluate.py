"""Does scoring cost more than the forward passes? Tokens per CPU second of what `evaluate` does, against a bare loop.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python bench/evaluate.py [--size 300M] [--dtype bf16] [--max-documents N] [--repeats 5]

The bare loop is what one would write for a perplexity: `model(ids).logits` of each batch, its cross-entropy, one sum. Both read the same
windows in the same batches, from models that are loaded before. The stage also keeps every token's loss, by document and by position. The
second row has a reference: the bare loop then runs both models, and takes the KL divergence of their logits. So it does in the third, where
the stage reads the reference's stored hidden states. The two ways alternate, and the fastest run of each counts, since other work can only
slow one down; the spread is that of the ratios of neighbouring runs. Without --size it is the small model on its held-out text; 300M is
random.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.memory import ASSETS, SMALL, config, make_checkpoint
from bench.processor import processor
from pipeline.artifact import Dataset, DenseCheckpoint, HiddenStates
from pipeline.compute_dtype import processor_dtype
from pipeline.stage import Context
from stages.evaluate import Evaluate
from stages.hidden_states import StoreHiddenStates
from stages.runtime.evaluation import Document, Tally, encode
from stages.runtime.loading import COMPUTE_DTYPES
from stages.runtime.scoring import ResidentScorer, Stored, load_served, padded
from stages.runtime.stored_states import StoredView
from stages.runtime.windows import Window, batches, cut_windows, scored

ROW = "{:<16} {:>8} {:>10} {:>10} {:>7} {:>15}"
ALONE, BESIDE, STORED = "alone", "with reference", "reference stored"
Work = Sequence[Sequence[Window]]


@torch.inference_mode()
def bare_loop(work: Work, model: Any, reference: Any | None) -> float:
    """Nats per token, for comparison."""
    nll = kl = 0.0
    for batch in work:
        ids = padded(batch)
        targets = ids[:, 1:].clone()
        for row, window in enumerate(batch):
            targets[row, len(window.ids) - 1 :] = -100
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        nll += functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        if reference is not None:
            expected = reference(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            divergence = functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            kl += divergence[targets.flatten() >= 0].sum().item()
    return nll / sum(map(scored, work))


def stage_loop(documents: Sequence[Document], work: Work, scorer: ResidentScorer, window: int) -> float:
    tally = Tally(documents, window, with_reference=scorer.beside is not None)
    for scores in scorer.scores(work, lambda done, total: None):
        tally.add(scores)
    return tally.metrics()["nll_per_token"]


def alternate(first: Callable[[], float], second: Callable[[], float], repeats: int) -> list[tuple[float, float]]:
    """CPU seconds of both, by repeat; the first round, which is for warming up, is not told, but must agree."""
    assert abs(first() - second()) < 1e-3, "the two do not compute the same"
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        first()
        between = time.process_time()
        second()
        seconds.append((between - started, time.process_time() - between))
    return seconds


def store(model: Path, text: Dataset, options: argparse.Namespace) -> HiddenStates:
    params = {"max_length": options.max_length, "max_documents": options.max_documents, "compute_dtype": options.dtype}
    stage = StoreHiddenStates.from_dict(params, {"batch_size": options.batch_size, "device": "cpu"})
    return stage.run(Context(model.parent / "states", lambda event: None), DenseCheckpoint(model), text)


def compare(label: str, model: Path, options: argparse.Namespace) -> None:
    checkpoint, text = DenseCheckpoint(model), Dataset(ASSETS / "data/eval.jsonl")
    spec, place, dtype = checkpoint.model_spec, torch.device("cpu"), COMPUTE_DTYPES[options.dtype]
    window = Evaluate.from_dict({"max_length": options.max_length}).window(spec)
    documents = encode(text, model, spec.architecture.vocab_size, options.max_documents)
    work = list(batches(cut_windows([document.ids for document in documents], window), options.batch_size))
    tokens, stored = sum(map(scored, work)), Stored()
    if label == STORED:
        stored = Stored(reference=StoredView(store(model, text, options).path, tokens, model, place, dtype))
    scorer = ResidentScorer(model, None if label == ALONE else model, place, dtype, stored)
    loaded = load_served(model, place, dtype).model
    models = (loaded, None if label == ALONE else loaded)
    seconds = alternate(lambda: bare_loop(work, *models), lambda: stage_loop(documents, work, scorer, window), options.repeats)
    bare, stage = (tokens / min(column) for column in zip(*seconds, strict=True))
    ratios = sorted(a / b for a, b in seconds)
    spread = f"{ratios[0]:.2f} {statistics.median(ratios):.2f} {ratios[-1]:.2f}"
    row = ROW.format(label, f"{tokens:,}", f"{bare:,.0f}", f"{stage:,.0f}", f"{stage / bare:.3f}", spread)
    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["300M", "1B"], help="a random model instead of the small one")
    parser.add_argument("--dtype", choices=list(COMPUTE_DTYPES), default=processor_dtype(), help="as auto decides, if not given")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{processor()}; {options.dtype}")
    print(ROW.format("", "tokens", "bare loop", "stage", "ratio", "low median high"))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if options.size:
            make_checkpoint(model, config(options.size, 4096))
        else:
            model.symlink_to(SMALL)
        for label in (ALONE, BESIDE, STORED):
            compare(label, model, options)


if __name__ == "__main__":
    main()
