"""`make test-gpu`: what a plan says of a GPU's memory, beside what torch took of it, and whether results are the same either way.

    python -m tests.gpu.measure --json gpu.json                              on a machine with an NVIDIA card; docs/gpu.md
    python -m tests.gpu.measure --json cpu.json --device cpu --model tiny    the same rows, rehearsed without one: RAM for VRAM

Every row (tests/gpu/rows.py) is planned for this machine, run by a real worker and held to its plan by the guard, as `run` would do it,
but without Hydra and MLflow, which a rented machine need not have. The JSON is written anew after each row, so that a session that is
cut short leaves what it measured. The model is random: this shows memory, time and equality, not quality.
"""

import argparse
import importlib.metadata
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.memory import ASSETS, ROOT, config, make_checkpoint
from pipeline import machine
from pipeline.artifact import Manifest
from pipeline.errors import Interrupted, LlmpressError
from pipeline.executor import execute
from pipeline.library_defaults import set_library_defaults
from pipeline.plan import PlannedNode, make_plan
from pipeline.process import ForkServer
from pipeline.recipe import read_config
from pipeline.spec import ModelSpec
from pipeline.store import Store
from pipeline.target import Target, format_size
from tests.gpu import card
from tests.gpu.agreement import Made, agreement
from tests.gpu.rows import DENSE, SIZES, Row, Sizes, rows

LIBRARIES = (
    "torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy", "pydantic", "compressed-tensors", "llmcompressor",
    "datasets", "hydra-core", "omegaconf", "mlflow", "bitsandbytes",
)  # fmt: skip
DATA = {split: str(ASSETS / f"data/{split}.jsonl") for split in ("calibration", "eval", "train")}
VOCABULARY = 4096  # the words of assets/small-llama

# A plan has to be enough, and not twice what was needed. `BESIDE` is what torch's allocator holds for others: of cuBLAS, 32 MiB for each
# thread that multiplies on Hopper cards, and the rest of the 20 MiB segments that small tensors are cut from.
MOST, LEAST, BESIDE = 1.1, 0.5, 128 << 20


@dataclass
class Session:
    """One run of the rows: where it works, and all that goes into the JSON."""

    scratch: Path
    json: Path
    target: Mapping[str, Any]
    on_gpu: bool
    record: dict[str, Any]
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return "vram" if self.on_gpu else "ram"

    def run(self, row: Row, server: ForkServer) -> None:
        """Adds what was found to the record, and writes it."""
        started, found = time.monotonic(), {"name": row.name, "stage": row.stage, "problems": []}
        missing = sorted(name for name in row.needs if name not in self.made)
        try:
            if missing:
                found["problems"].append(f"not run: it needs the result of {', '.join(missing)}")
            else:
                self._measure(row, server, found)
        except Interrupted:
            raise
        except LlmpressError as error:
            found["problems"].append(str(error))
            found["log"] = getattr(error, "tail", "")
        except Exception:  # minutes on a card are few: the other rows are still worth theirs, and the exit status says that one broke
            found["problems"].append(traceback.format_exc())
        found["wall_seconds"] = round(time.monotonic() - started, 2)
        self.record["rows"].append(found)
        self.record["problems"] += [f"{row.name}: {problem}" for problem in found["problems"]]
        self.write()
        print(line(found, self.place), flush=True)

    def _measure(self, row: Row, server: ForkServer, found: dict[str, Any]) -> None:
        outputs = self.scratch / row.name.replace(", ", "-").replace(" ", "-")
        outputs.mkdir()
        models = {DENSE: str(self.scratch / DENSE), **{name: str(made.path) for name, made in self.made.items()}}
        recipe, _ = read_config(row.recipe(models, DATA, self.target), row.name)
        store = Store(outputs)
        plan = make_plan(recipe, store, ROOT, execute=True)
        found["problems"] += plan.problems
        (node,) = plan.nodes
        found["planned"] = node.memory.model_dump()  # here, so that it is there too where the row fails
        (result,) = execute(plan, store, outputs / "run", [self._listen], server)
        manifest = result.manifest
        made = Made(row.stage, result.path, manifest, computed_in(node))
        found |= measured(node, manifest, self.on_gpu)
        found["problems"] += [f"{name} is {value}" for name, value in manifest.metrics.items() if not math.isfinite(value)]
        if self.on_gpu:  # beside the libraries, a tiny model's RAM says little; bench/memory.py measures that
            found["problems"] += vram_problems(found["planned_bytes"], found["measured_bytes"])
        self.made[row.name] = made
        if row.equals in self.made:
            found["agreement"] = {"with": row.equals, **agreement(made, self.made[row.equals], self.on_gpu)}
            found["problems"] += disagreement(found["agreement"])

    def _listen(self, event: dict[str, Any]) -> None:
        if event["event"] == "warning" and event["text"] not in self.record["warnings"]:
            self.record["warnings"].append(event["text"])

    def write(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.record["started"], 2)
        content = {name: value for name, value in self.record.items() if name != "started"}
        temporary = self.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.rename(self.json)


def computed_in(node: PlannedNode) -> str | None:
    """The dtype that the plan chose for its products; None: it has none."""
    return node.stage.params.compute_dtype if node.stage.computes else None


def measured(node: PlannedNode, manifest: Manifest, on_gpu: bool) -> dict[str, Any]:
    """Bytes; `ratio` is measured to planned."""
    planned = node.memory.totals["vram" if on_gpu else "ram"]
    peak = manifest.peak_vram if on_gpu else manifest.peak_ram
    return {
        "seconds": round(manifest.seconds, 2),
        "planned_bytes": planned,
        "measured_bytes": peak,
        "ratio": round(peak / planned, 3) if peak is not None and planned else None,
        "ram": {"planned": node.memory.totals["ram"], "measured": manifest.peak_ram},
        "tensor_bytes": manifest.tensor_bytes,
        "computed_in": computed_in(node),
        "params": manifest.params,
        "execution": manifest.execution,
        "results": dict(manifest.metrics),
        "notes": list(manifest.notes),
        "code": manifest.fingerprint,
    }


def vram_problems(planned: int, peak: int | None) -> list[str]:
    """In bytes; `peak` None: the worker did not touch the GPU."""
    if planned and peak is None:
        return [f"planned {format_size(planned)} of VRAM and used no GPU"]
    peak = peak or 0
    beside = BESIDE if planned else 0
    if peak > MOST * planned + beside:
        return [f"took {format_size(peak)} of VRAM, planned were {format_size(planned)}"]
    if peak + beside < LEAST * planned:
        return [f"planned {format_size(planned)} of VRAM and took {format_size(peak)}"]
    return []


def disagreement(found: Mapping[str, Any]) -> list[str]:
    if found["difference"] <= found["allowed"]:  # not where it is nan
        return []
    return [f"differs from {found['with']} by {found['difference']:.3g} ({found['what']}), {found['allowed']:.3g} is allowed"]


def line(found: Mapping[str, Any], place: str) -> str:
    """Of one row, for the terminal; its problems below it."""
    said = f"{found['name']:<40} {found['wall_seconds']:>6.1f} s"
    if "measured_bytes" in found:
        peak = found["measured_bytes"]
        said += f"  {place} {'none' if peak is None else format_size(peak)} of {format_size(found['planned_bytes'])} planned"
    if "agreement" in found:
        said += f"; differs from {found['agreement']['with']} by {found['agreement']['difference']:.2g}"
    return "\n".join([said, *(f"    {problem}" for problem in found["problems"])])


def versions() -> dict[str, str | None]:
    """None: not installed."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def chosen_rows(sizes: Sizes, names: list[str] | None) -> list[Row]:
    """Those of that name, with what they need. All of them where none is named."""
    known = {row.name: row for row in rows(sizes)}
    wanted = set(names or known)
    if unknown := sorted(wanted - set(known)):
        raise SystemExit(f"--rows: there is no row '{unknown[0]}'; there are: {', '.join(known)}")
    for row in reversed(known.values()):
        if row.name in wanted:
            wanted |= row.needs | ({row.equals} - {""})
    return [row for row in known.values() if row.name in wanted]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=list(SIZES), default="300M")
    parser.add_argument("--layers", type=int, help="of the model, instead of all of its own")
    parser.add_argument("--rows", nargs="+", help="their names; what they need runs too (default: all)")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, with 10 GB free at the full size (default: the system's)")
    return parser.parse_args(arguments)


def target(found: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """This machine as a recipe's target; `found` as torch says of the card."""
    if not on_gpu:
        return {"name": "host"}
    host, of_card = Target.host(), ("memory", "compute_capability")
    return {"name": "card", "gpus": 1, "ram": host.ram, "cores": host.cores, **{name: found[name] for name in of_card}}


def begin(options: argparse.Namespace, sizes: Sizes, scratch: Path) -> Session:
    """With the random model made."""
    started = time.monotonic()
    found = card.ask()
    on_gpu = options.device == "cuda"
    if on_gpu and not found["count"]:
        raise SystemExit("--device: there is no NVIDIA card here that torch can use; write --device cpu to rehearse without one")
    content = config(sizes.model, VOCABULARY) | {"num_hidden_layers": sizes.layers}
    make_checkpoint(scratch / DENSE, content)
    spec = ModelSpec.from_config(content)
    record = {
        "started": started,
        "device": options.device,
        "machine": {"description": machine.fingerprint(), "card": found},
        "versions": versions(),
        "model": {"parameters": spec.num_parameters, "bytes": spec.nbytes, "layers": sizes.layers, "windows": sizes.windows,
                  "max_length": sizes.max_length},
        "seconds": 0.0,
        "rows": [],
        "warnings": [],
        "problems": [],
    }  # fmt: skip
    return Session(scratch, options.json.absolute(), target(found, on_gpu), on_gpu, record)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 where every row ran, took what was planned and agreed."""
    options = parse(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if options.device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    set_library_defaults()
    sizes = SIZES[options.model]
    sizes = replace(sizes, layers=options.layers or sizes.layers)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="llmpress-gpu-") as folder:
        session = begin(options, sizes, Path(folder))
        with ForkServer(Path(folder) / "forkserver.log") as server:
            for row in chosen_rows(sizes, options.rows):
                session.run(row, server)
    record = session.record
    print(f"{len(record['rows'])} rows in {record['seconds']:.0f} s, {len(record['problems'])} problems: {options.json}")
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
