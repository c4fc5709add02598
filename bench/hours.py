"""What a plan says each stage of a recipe takes on this machine, and what it takes.

    python bench/hours.py [recipe=quickstart] [any other override, such as stages.distill.num_samples=64]

Runs the recipe into an empty store. `cpu` is what the stage's process and those that it started computed (of the first stage, the imports
that workers share too), `others` the share of all cores that other processes took meanwhile: a row is worth something where that is next to
nothing. The last row is the whole run.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from bench.processor import processor
from pipeline import compose
from pipeline.executor import execute
from pipeline.plan import Plan, make_plan
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.roofline import usual_utilisation
from pipeline.store import Store, check_writable

ROW = "{:<24} {:>9} {:>9} {:>9} {:>7} {:>17}"
TICKS = os.sysconf("SC_CLK_TCK")


class Measured:
    """A listener that prints a row for each stage that ran."""

    def __init__(self, plan: Plan, server: ForkServer) -> None:
        self.planned = {node.name: node.seconds for node in plan.nodes}
        self.server, self.before = server, Used.now(server)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "node_finished":
            used = Used.now(self.server)
            row(event["node"], self.planned[event["node"]], event["seconds"], self.before, used)
            self.before = used


class Used(NamedTuple):
    """Seconds since some moment: that passed, that the fork server and all workers that have ended computed, that anybody did."""

    passed: float
    own: float
    anybody: float

    @classmethod
    def now(cls, server: ForkServer) -> "Used":
        fields = Path(f"/proc/{server._server.pid}/stat").read_text().rpartition(")")[2].split()[11:15] if server._server else []
        idle = (first := Path("/proc/stat").read_text().split("\n")[0].split()[1:])[3:5]
        busy = sum(map(int, first[:8])) - sum(map(int, idle))
        return cls(time.monotonic(), sum(map(int, fields)) / TICKS, busy / TICKS)


def row(name: str, planned: float | None, took: float, before: Used, after: Used) -> None:
    ratio = f"{planned / took:.2f}" if planned is not None else "not known"
    own, passed = after.own - before.own, after.passed - before.passed
    others = max(after.anybody - before.anybody - own, 0) / passed / (os.cpu_count() or 1)
    print(ROW.format(name, f"{planned or 0:.2f} s", f"{took:.2f} s", f"{own:.2f} s", f"{others:.0%}", ratio), flush=True)


def main() -> None:
    overrides = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in overrides):
        print(__doc__)
        return
    compose.register()
    chosen = overrides if any(argument.startswith("recipe=") for argument in overrides) else ["recipe=quickstart", *overrides]
    config = OmegaConf.to_container(compose.composed(chosen), resolve=True)
    assert isinstance(config, dict)
    recipe, _ = read_config({str(key): value for key, value in config.items()}, "hours")
    with tempfile.TemporaryDirectory() as name, ForkServer(Path(name) / "forkserver.log") as server:
        store = Store(Path(name) / "outputs")
        check_writable(store.root)
        plan = make_plan(recipe, store, compose.resources(), execute=True)
        told, dtypes = plan.recipe.machine, {node.stage.compute_dtype for node in plan.nodes} - {None}
        rates = {"flops": told.flops, "float32_flops": told.float32_flops, "bandwidth": told.bandwidth}
        said = [f"target.{name}={rate / 1e9:.4g}e9" for name, rate in rates.items() if rate]
        print(f"{processor()}; computed in {' and '.join(sorted(map(str, dtypes)))}")
        print(f"{' '.join(said)} target.core_speed={told.core_speed:.3g}, of which {usual_utilisation(told):.0%} are planned with\n")
        print(ROW.format("stage", "planned", "measured", "cpu", "others", "planned/measured"))
        started = Used.now(server)
        execute(plan, store, Path(name) / "run", [Measured(plan, server)], server)
        ended = Used.now(server)
        row("all", plan.seconds, ended.passed - started.passed, started, ended)


if __name__ == "__main__":
    main()
