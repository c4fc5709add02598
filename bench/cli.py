"""What a command costs before it does anything: `python bench/cli.py [--repeats 5] [--hits]`, in CPU seconds, user and system.

Each is also told as a multiple of what importing hydra, omegaconf and pydantic takes, measured in turn with it: that is what to compare
across machines. `first` is what it costs where nothing is remembered but how fast the machine is: after an installation or an edited
file, and with arguments that are new. `again` is what it costs with the same arguments; a TAB, wherever that recipe was completed before.
`--hits` runs the quickstart into an empty store, and then tells what it costs where every stage is a hit; not counted is the record in
MLflow, which another process writes meanwhile.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.processor import processor
from pipeline.remembered import cache_folder

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "pipeline"]
UNIT = [sys.executable, "-c", "import hydra, omegaconf, pydantic"]
ALWAYS = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # what is compiled once is not part of what a command costs
LIMITS = {"run": 1.5, "run --help": 2.4, "one TAB": 0.8, "mode=plan of 70 B": 2.4, "quickstart, every stage a hit": 2.9}


def cpu_seconds(command: list[str], **environment: str) -> float:
    """Of a command that must succeed, and of all processes that it waited for."""
    before = os.times()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ALWAYS, **environment}, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return after.children_user + after.children_system - before.children_user - before.children_system


def tell(label: str, command: list[str], repeats: int, **environment: str) -> None:
    with tempfile.TemporaryDirectory() as empty:
        first = [in_units(command, repeats=1, **environment, XDG_CACHE_HOME=only_rates(Path(empty) / str(n))) for n in range(repeats)]
    cpu_seconds(command, **environment)
    again = in_units(command, repeats, **environment)
    limit = f"limit {LIMITS[label]} x" if label in LIMITS else ""
    print(f"{label:<32} first {median(row[1] for row in first):6.2f} x   again {again[0]:6.2f} s {again[1]:6.2f} x   {limit}", flush=True)


def in_units(command: list[str], repeats: int, **environment: str) -> tuple[float, float]:
    """CPU seconds, and as a multiple of UNIT, which takes its turn each time."""
    rows = [(cpu_seconds(command, **environment), cpu_seconds(UNIT)) for _ in range(repeats)]
    return median(row[0] for row in rows), median(row[0] / row[1] for row in rows)


def only_rates(folder: Path) -> str:
    """A cache that holds how fast the machine is, which is measured once, and nothing else."""
    (folder / "llmpress").mkdir(parents=True)
    for file in cache_folder().glob("rates-*"):
        shutil.copy(file, folder / "llmpress")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hits", action="store_true", help="a quickstart with every stage a hit, too")
    args = parser.parse_args()
    print(f"{processor()}; {' '.join(UNIT[1:])}: {median(cpu_seconds(UNIT) for _ in range(args.repeats)):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        outputs = f"outputs={folder}/outputs"
        tell("run", RUN, args.repeats)
        tell("run --help", [*RUN, "--help"], args.repeats)
        tell("run recipe=quickstart --help", [*RUN, "recipe=quickstart", "--help"], args.repeats)
        tell("one TAB", [*RUN, "-sc", "query=bash"], args.repeats, COMP_LINE="run recipe=quickstart stages.quantize.gr")
        tell("mode=plan of 70 B", [*RUN, "recipe=70b_to_single_a100", "mode=plan", outputs], args.repeats)
        tell("mode=plan of the quickstart", [*RUN, "recipe=quickstart", "mode=plan", outputs], args.repeats)
        if args.hits:
            cpu_seconds([*RUN, "recipe=quickstart", outputs])
            tell("quickstart, every stage a hit", [*RUN, "recipe=quickstart", outputs], args.repeats)
            tell("the same, without MLflow", [*RUN, "recipe=quickstart", outputs, "tracking.enabled=false"], args.repeats)


if __name__ == "__main__":
    main()
