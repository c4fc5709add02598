"""Formats side by side: `python bench/formats.py [--gguf] [--backends] [--outputs FOLDER]`.

Runs the recipe `formats_shootout` as a sweep and prints one table from the jobs' reports: size, bits per weight, perplexity with its change
against the source model, KL divergence, flips (tokens whose most likely next token changed), decode speed and time to load on this
machine, and what making it took: seconds and peak memory above the stage's imports. `--gguf` adds llama.cpp's formats (extra `gguf`),
`--backends` the other libraries that make GPTQ and AWQ checkpoints, each in an environment of its own, which is built first.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GGUF = ("gguf_f16", "gguf_q8", "gguf_q5", "gguf_q4", "gguf_q2")
BACKENDS = {"gptq4": ("gptqmodel", "auto_gptq"), "awq4": ("gptqmodel", "autoawq")}
COLUMNS = ("format", "MB", "bits/w", "perplexity", "change", "KL", "flips", "decode tok/s", "load", "made in", "peak RAM")


def run(arguments: Sequence[str], outputs: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "-m",
        "recipe=formats_shootout",
        *arguments,
        f"outputs={outputs}",
        "tracking.enabled=false",
    ]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode not in (0, 2, 3, 4):
        raise SystemExit("the sweep did not end; its messages are above")


def jobs(outputs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The backend that was asked for and the report, of every job of every sweep, in the order in which they ran; what failed is told."""
    records = [json.loads(file.read_text()) for file in (outputs / "sweeps").glob("formats_shootout-*/jobs/*.json")]
    for record in sorted(records, key=lambda record: record["started"]):
        if record["exit_code"] == 0:
            asked = [override.partition("=")[2] for override in record["overrides"] if ".backend=" in override]
            yield "".join(asked), json.loads((Path(record["run_dir"]) / "report.json").read_text())
        else:
            print(f"failed: {record['name'] or record['overrides']}: {record['error']}")


def row(backend: str, report: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one job; empty where its engine does not say."""
    made = next(stage for stage in report["stages"] if stage["planned_bytes"] is not None)
    speed = next((stage["metrics"] for stage in report["stages"] if stage["stage"] == "benchmark"), {})
    metrics = report["metrics"]
    peak = None if made["measured_peak"] is None else made["measured_peak"] - (made["measured_floor"] or 0)
    cells = (
        f"{metrics['nbytes'] / 1e6:.2f}", f"{metrics['bits_per_weight']:.2f}", f"{metrics['perplexity']:.3f}",
        f"{metrics['perplexity_change_pct']:+.2f} %", f"{metrics['kl_divergence']:.4f}", f"{100 * (1 - metrics['top1_agreement']):.1f} %",
        f"{speed['decode_tokens_per_second_b1']:.0f}" if "decode_tokens_per_second_b1" in speed else "",
        f"{speed['load_seconds']:.2f} s" if "load_seconds" in speed else "", f"{made['seconds']:.1f} s",
        "" if peak is None else f"{peak / 1e6:.0f} MB",
    )  # fmt: skip
    return (f"{made['name']} {backend}".rstrip(), *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", action="store_true", help="llama.cpp's formats too")
    parser.add_argument("--backends", action="store_true", help="other libraries too")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    args = parser.parse_args()
    outputs = args.outputs.absolute()
    run([], outputs)
    if args.gguf:
        run([f"order={','.join(f'[{name},evaluate,speed]' for name in GGUF)}", "stages.speed.engine=llama.cpp"], outputs)
    for name, backends in BACKENDS.items() if args.backends else ():
        run([f"order=[{name},evaluate,speed]", f"stages.{name}.backend={','.join(backends)}"], outputs)
    rows = [COLUMNS, *(row(*job) for job in jobs(outputs))]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(COLUMNS))]
    for cells in rows:
        print(
            "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        )


if __name__ == "__main__":
    main()
