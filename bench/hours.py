"""What a plan says each stage of a recipe takes on this machine, and what it takes.

    python bench/hours.py [recipe=quickstart] [any other override, such as stages.distill.num_samples=64]

Runs the recipe into an empty store. `cpu` is what the stage's process and those that it started computed: where others share the cores, it
tells more than the time does. The last row is the whole run, the imports that its workers share included.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline import compose, machine
from pipeline.executor import execute
from pipeline.plan import Plan, make_plan
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.roofline import usual_utilisation
from pipeline.store import Store, check_writable

ROW = "{:<24} {:>9} {:>9} {:>9} {:>17}"
TICKS = os.sysconf("SC_CLK_TCK")


class Measured:
    """A listener that prints a row for each stage that ran."""

    def __init__(self, plan: Plan, server: ForkServer) -> None:
        self.planned = {node.name: node.seconds for node in plan.nodes}
        self.server, self.computed = server, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "node_finished":
            before, self.computed = self.computed, computed(self.server)
            row(event["node"], self.planned[event["node"]], event["seconds"], self.computed - before)


def computed(server: ForkServer) -> float:
    """CPU seconds of the fork server and all workers that have ended."""
    assert server._server is not None, "a stage has run"
    fields = Path(f"/proc/{server._server.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def row(name: str, planned: float | None, took: float, cpu: float) -> None:
    ratio = f"{planned / took:.2f}" if planned is not None else "not known"
    print(ROW.format(name, f"{planned or 0:.2f} s", f"{took:.2f} s", f"{cpu:.2f} s", ratio), flush=True)


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
        print(f"{machine.fingerprint()}; computed in {' and '.join(sorted(map(str, dtypes)))}; load {os.getloadavg()[0]:.1f} before")
        print(f"{' '.join(said)} target.core_speed={told.core_speed:.3g}, of which {usual_utilisation(told):.0%} are planned with\n")
        print(ROW.format("stage", "planned", "measured", "cpu", "planned/measured"))
        started = time.monotonic()
        execute(plan, store, Path(name) / "run", [Measured(plan, server)], server)
        row("all", plan.seconds, time.monotonic() - started, computed(server))


if __name__ == "__main__":
    main()
