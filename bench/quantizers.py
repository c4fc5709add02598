"""AWQ, GPTQ and round-to-nearest at 4, 3 and 2 bits: are their differences real, and how much does each cost?

    python bench/quantizers.py [--model FOLDER] [--calibration FILE] [--eval FILE] [--group-size 128] [--asymmetric]

Every checkpoint is evaluated beside the source on the same documents. Intervals are 95 % paired bootstrap over documents; a
difference whose interval holds 0 is called a tie. Runs the stages themselves, without store or workers, in a temporary folder.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import llmcompressor  # noqa: F401  # imported here so that no stage is charged for it
import torch
from loguru import logger

from pipeline.artifact import Artifact, Checkpoint, Dataset, DenseCheckpoint
from pipeline.stage import Context, find_stage
from stages.functional.bootstrap import Interval, paired_bootstrap

ASSETS = Path(__file__).parent.parent / "assets"
ROW = "{:<6} {:>4} {:>9} {:>7} {:>10} {:>28} {:>9} {:>7} {:>8}"


def run_stage(name: str, output: Path, params: dict[str, Any], **inputs: Artifact) -> Any:
    stage = find_stage(name).from_dict(params)
    return stage.run(Context(output, lambda event: None), **inputs)


def document_losses(report: Path) -> dict[str, torch.Tensor]:
    """[documents] float64 by column of report.json."""
    rows = json.loads((report / "report.json").read_text())["documents"]
    return {column: torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in ("nll", "reference_nll", "tokens")}


def format_percent(interval: Interval) -> str:
    found = interval.perplexity_change_pct
    words = f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}] %"
    return f"{words} tie" if interval.is_tie else words


def score(
    method: str, bits: int, made: Checkpoint, source: Checkpoint, text: Dataset, folder: Path, seconds: float
) -> dict[str, torch.Tensor]:
    """Evaluate one checkpoint beside the source and print its row."""
    report = run_stage("evaluate", folder, {}, model=made, eval=text, reference=source)
    losses, metrics = document_losses(folder), report.metrics
    change = paired_bootstrap(losses["nll"], losses["reference_nll"], losses["tokens"])
    size, width = f"{metrics['nbytes'] / 1e6:.2f} MB", f"{metrics['bits_per_weight']:.2f}"
    quality = (
        f"{metrics['perplexity']:.3f}",
        format_percent(change),
        f"{metrics['kl_divergence']:.4f}",
        f"{metrics['top1_agreement']:.3f}",
    )
    print(ROW.format(method, bits, size, width, *quality, f"{seconds:.1f}"), flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "small-llama")
    parser.add_argument("--calibration", type=Path, default=ASSETS / "data/calibration.jsonl")
    parser.add_argument("--eval", type=Path, default=ASSETS / "data/eval.jsonl")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true", help="zero points, for every method: else awq alone would have them")
    parser.add_argument("--ignore", nargs="*", default=["lm_head"], help="layers left dense, as in the stages")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    logger.disable("llmcompressor")  # it reports every layer on stdout, where the table goes
    source, text, calibration = DenseCheckpoint(options.model), Dataset(options.eval), Dataset(options.calibration)
    print(ROW.format("method", "bits", "size", "b/w", "perplexity", "change", "KL", "top-1", "seconds"))
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            params = {"num_bits": bits, "group_size": options.group_size, "symmetric": not options.asymmetric, "ignore": options.ignore}
            losses = {}
            for method in ("rtn", "gptq", "awq"):
                calibrated = method != "rtn"
                own = {"num_samples": options.num_samples, "max_length": options.max_length} if calibrated else {}
                inputs: dict[str, Artifact] = {"model": source} | ({"calibration": calibration} if calibrated else {})
                output, started = Path(folder) / f"{method}-{bits}", time.perf_counter()
                made = run_stage(method, output, params | own, **inputs)
                losses[method] = score(method, bits, made, source, text, output.with_suffix(".report"), time.perf_counter() - started)
            for one, other in (("gptq", "rtn"), ("awq", "rtn"), ("awq", "gptq")):
                difference = paired_bootstrap(losses[one]["nll"], losses[other]["nll"], losses[other]["tokens"])
                differences.append(f"  {bits} bits  {one:>4} against {other:<4}  {format_percent(difference)}")
    print("\nchange of perplexity, paired by document", *differences, sep="\n")


if __name__ == "__main__":
    main()
