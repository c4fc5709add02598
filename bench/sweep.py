"""What a sweep saves and costs: `python bench/sweep.py [--part shared|cached|parallel]`.

    shared     the six orders of `ordering_study`, each a job: with one store, and with an empty store for every job
    cached     24 jobs of which every stage is a hit
    parallel   the jobs of `shared` with one store, two joblib workers against one; one core each

Training is cut down to 64 windows (--samples) and evaluation to 16 documents, since what is measured is which executions are saved and
what is spent around them; where all are hits, to less, since nothing of it is timed. Wall times of what is compared come from one run of
this script and alternate where they are repeated. Stage executions are counted in the reports of the jobs and held against the plan of
the sweep.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "pipeline"]
STUDY = ("recipe=ordering_study", "tracking.enabled=false")
ORDERS = "hydra/sweeper=orders"
JOBS = [f"order=[{','.join(order)},evaluate]" for order in permutations(("prune", "distill", "quantize"))]
PARALLEL = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2")


def run(arguments: Sequence[str], outputs: Path) -> float:
    """Wall time of a command that must succeed. One core for each job, whatever the launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    done = subprocess.run([*RUN, *arguments, f"outputs={outputs}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - started


def executions(outputs: Path) -> int:
    """How many stages were executed below `outputs` by the last command, over all its jobs."""
    reports = [json.loads(file.read_text()) for file in outputs.glob("runs/*/*/report.json")]
    return sum(stage["status"] == "ran" for report in reports for stage in report["stages"])


def planned(study: Sequence[str], outputs: Path) -> dict[str, int]:
    """What the plan of the sweep says before anything runs: `without_sharing`, `distinct`, `to_run`."""
    command = [*RUN, "-m", *study, ORDERS, "mode=plan", "format=json", f"outputs={outputs}"]
    tree = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert tree["jobs"] == len(JOBS), "every order is legal"
    counts: dict[str, int] = tree["executions"]
    return counts


def shared(study: Sequence[str], folder: Path) -> None:
    study = (*study, "stages.distill.seed=0")
    counts = planned(study, folder / "together")
    together = run(["-m", *study, ORDERS], folder / "together")
    ran = executions(folder / "together")
    alone, count = 0.0, 0
    for number, order in enumerate(JOBS):
        place = folder / f"alone{number}"
        alone += run([*study, order], place)
        count += executions(place)
    assert (ran, count) == (counts["distinct"], counts["without_sharing"]), "the plan said so"
    print(f"one store            {ran:3} stage executions {together:7.1f} s")
    print(f"a store for each job {count:3} stage executions {alone:7.1f} s: {alone / together:.2f} times as long", flush=True)


def cached(_: Sequence[str], folder: Path) -> None:
    seeds = "stages.distill.seed=0,1,2,3"
    short = [*STUDY, "stages.distill.num_samples=16", "stages.distill.max_length=64", "stages.evaluate.max_documents=1"]
    filled = run(["-m", *short, ORDERS, seeds], folder / "cached")
    before = os.times()
    times = [run(["-m", *short, ORDERS, seeds], folder / "cached") for _ in range(3)]
    after = os.times()
    cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / len(times)
    assert executions(folder / "cached") == 0, "every stage is a hit"
    print(f"24 jobs, all hits    {statistics.median(times):7.1f} s, the median of 3, {cpu:.1f} s of CPU each", end="; ")
    print(f"{filled:.1f} s when the stages ran", flush=True)


def parallel(study: Sequence[str], folder: Path) -> None:
    seeds = "stages.distill.seed=0,1"
    one, two = [], []
    for repeat in range(2):
        one.append(run(["-m", *study, ORDERS, seeds], folder / f"one{repeat}"))
        two.append(run(["-m", *study, ORDERS, seeds, *PARALLEL], folder / f"two{repeat}"))
        assert executions(folder / f"one{repeat}") == executions(folder / f"two{repeat}"), "nothing runs twice"
        print(f"{repeat + 1}: one worker {one[-1]:.1f} s, two workers {two[-1]:.1f} s: {one[-1] / two[-1]:.2f} times as fast", flush=True)
    print(f"two workers against one: {statistics.median(one) / statistics.median(two):.2f} times as fast", flush=True)


PARTS = {"shared": shared, "cached": cached, "parallel": parallel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="all without it")
    parser.add_argument("--samples", type=int, default=64, help="windows that each training sees")
    args = parser.parse_args()
    study = (*STUDY, f"stages.distill.num_samples={args.samples}", "stages.evaluate.max_documents=16")
    for name in args.part or PARTS:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            PARTS[name](study, Path(folder))


if __name__ == "__main__":
    main()
