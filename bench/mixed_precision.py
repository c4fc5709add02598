"""Bits by layer against the same bits everywhere at equal size: `python bench/mixed_precision.py [--outputs FOLDER]`.

Runs the recipe `mixed_precision` as sweeps of two jobs and prints what their rankings say: bytes, perplexity and KL divergence of both, and
how much higher the worse one's perplexity is, with the paired 95 % interval. The sensitivities are measured once.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAIRS = ((4.125, 4, 128), (4.5, 4, 32), (3.5, 3, 32))  # budget; uniform bits and their group size


def sweep(outputs: Path, budget: float, num_bits: int, group_size: int) -> dict[str, Any]:
    folder = outputs / "sweeps" / f"mixed-{budget}"
    settings = (f"stages.mixed.mixed_precision.budget_bits={budget}", f"stages.uniform={{num_bits:{num_bits},group_size:{group_size}}}")
    command = [sys.executable, "-m", "pipeline", "-m", "recipe=mixed_precision", *settings, f"outputs={outputs}", "tracking.enabled=false"]
    subprocess.run([*command, f"hydra.sweep.dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    outputs = parser.parse_args().outputs.absolute()
    for budget, num_bits, group_size in PAIRS:
        print(f"budget {budget} against {num_bits} bits in groups of {group_size}")
        for row in sweep(outputs, budget, num_bits, group_size)["rows"]:
            kl = json.loads((Path(row["folder"]) / "report.json").read_text())["metrics"]["kl_divergence"]
            change = row["vs_best"]
            behind = (
                f"  +{change['percent']:.2f} % [{change['low']:.2f}, {change['high']:.2f}]{', a tie' if row['tie'] else ''}"
                if change
                else ""
            )
            print(f"  {row['order'][-2]:<8} {row['nbytes']:>10,} B  perplexity {row['perplexity']:.3f}  KL {kl:.4f}{behind}")


if __name__ == "__main__":
    main()
