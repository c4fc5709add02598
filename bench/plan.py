"""What planning costs: `python bench/plan.py [--repeats 5] [--orders 1000]`.

Three figures: the CPU seconds of `run recipe=... mode=plan` as a person types it, interpreter, imports and composing included; the
milliseconds of `make_plan` alone for every recipe that comes with llmpress; and the seconds in which so many orders of the 70B recipe's
stages are planned, each from its sources to its fit. Every plan is made anew: nothing is kept between them but what a process reads
once, the machines of conf/target and the versions of libraries. A recipe on the small model reads and hashes its 10 MB each time. Each
figure is also told as a share of what importing hydra, omegaconf and pydantic takes, which is what to compare across machines.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from bench.processor import processor
from pipeline import compose
from pipeline.errors import RecipeError
from pipeline.plan import make_plan
from pipeline.recipe import Recipe, read_config
from pipeline.store import Store

ROOT = Path(__file__).parents[1]
LARGE = "70b_to_single_a100"
SHUFFLED = ("prune", "distill", "recover", "quantize", "kv_cache")  # between the teacher's logits and the last evaluation


def plan_seconds(name: str, outputs: Path) -> float:
    return cpu_seconds([sys.executable, "-m", "pipeline", f"recipe={name}", "mode=plan", f"outputs={outputs}"])


def import_seconds() -> float:
    return cpu_seconds([sys.executable, "-c", "import hydra, omegaconf, pydantic"])


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds, user and system, of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def composed(name: str) -> Recipe:
    with initialize_config_dir(str(compose.resources() / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("config", [f"recipe={name}"]), resolve=True)
    assert isinstance(config, dict)
    return read_config({str(key): value for key, value in config.items()}, name)[0]


def plan_milliseconds(recipe: Recipe, store: Store, repeats: int) -> float:
    """Median CPU time of `make_plan`, after a first one that imports the stages."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        make_plan(recipe, store, compose.resources(), execute=False)
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times[1:])


def orders() -> Iterator[tuple[str, ...]]:
    """Every order of the shuffled stages, with repetition, shorter ones first."""
    for length in count(1):
        yield from product(SHUFFLED, repeat=length)


def plan_orders(recipe: Recipe, store: Store, wanted: int) -> tuple[int, float, int]:
    """Plan orders until so many were legal. How many were refused, CPU seconds, and how many of the legal ones fit the target."""
    legal = refused = fitting = 0
    started = time.process_time()
    for order in orders():
        if legal == wanted:
            break
        try:
            plan = make_plan(replace(recipe, order=("teacher", *order, "evaluate")), store, compose.resources(), execute=False)
        except RecipeError:
            refused += 1
            continue
        legal += 1
        fitting += plan.served is not None and plan.served.fit.fits
    return refused, time.process_time() - started, fitting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--orders", type=int, default=1000)
    args = parser.parse_args()
    compose.register()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        imports, command = zip(*((import_seconds(), plan_seconds(LARGE, store.root)) for _ in range(args.repeats)), strict=True)
        unit, median = statistics.median(imports), statistics.median(command)
        print(f"{processor()}\nimport hydra, omegaconf, pydantic: {unit:.2f} s of CPU", flush=True)
        print(f"run recipe={LARGE} mode=plan: {median:.2f} s, {median / unit:.2f} x", flush=True)
        for name in [file.stem for file in compose.recipe_files()]:
            milliseconds = plan_milliseconds(composed(name), store, args.repeats)
            print(f"make_plan, {name}: {milliseconds:.1f} ms, {milliseconds / 1000 / unit:.3f} x", flush=True)
        refused, seconds, fitting = plan_orders(composed(LARGE), store, args.orders)
        tried = f"{args.orders:,} legal orders of {LARGE}, found among {args.orders + refused:,}"
        print(f"{tried}: {seconds:.1f} s, {1000 * seconds / (args.orders + refused):.1f} ms each; {fitting} serve the load on the target")


if __name__ == "__main__":
    main()
