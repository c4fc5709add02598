"""What the pipeline costs over a plain script that calls the same stages: `python bench/overhead.py [--dtype fp32] [--repeats 3]`.

The plain script is one process that imports the libraries once and calls each stage's own function, in the same order, on the
same data, with no graph, store, hashes, workers or tracking; its evaluations compute the reference anew each time, as such a script
would. The pipeline is `run recipe=quickstart` into an empty outputs folder, MLflow included. The two alternate in one run, since
machines are noisy; the figures are medians, wall and CPU seconds. Then the same command again: every stage a hit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.processor import processor

ROOT = Path(__file__).parents[1]
PLAIN = """
import json, sys
from pathlib import Path
from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.stage import Context, find_stage
assets, out = Path(sys.argv[1]), Path(sys.argv[2])
def text(split):
    file = assets / "data" / f"{split}.jsonl"
    return Dataset(file, DatasetSpec(split=split, digest="0", nbytes=file.stat().st_size))
made = {"model": DenseCheckpoint(assets / "small-llama")} | {f"data.{split}": text(split) for split in ("train", "calibration", "eval")}
for node in json.loads(Path(sys.argv[3]).read_text()):
    folder = out / node["name"]
    folder.mkdir(parents=True)
    stage = find_stage(node["stage"]).from_dict(node["params"])
    found = stage.run(Context(folder, lambda event: None), **{port: made[place] for port, place in node["inputs"].items()})
    for port in node["outputs"]:
        made[f"{node['name']}.{port}"] = getattr(found, port) if len(node["outputs"]) > 1 else found
"""


def seconds(command: list[str], dtype: str) -> tuple[float, float]:
    """Wall and CPU seconds of a command that must succeed, those of the processes that it starts included."""
    before, started = sum(os.times()[2:4]), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LLMPRESS_COMPUTE_DTYPE": dtype}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started, sum(os.times()[2:4]) - before


def nodes(dtype: str) -> list[dict[str, Any]]:
    """What the quickstart recipe composes to, without what is there for other stages alone."""
    command = [sys.executable, "-m", "pipeline", "recipe=quickstart", "mode=plan", "format=json"]
    plan = subprocess.check_output(command, cwd=ROOT, env={**os.environ, "LLMPRESS_COMPUTE_DTYPE": dtype})
    kept = [node for node in json.loads(plan)["nodes"] if node["stage"] != "hidden_states"]
    return [{key: node[key] for key in ("name", "stage", "params", "inputs")} | {"outputs": list(node["outputs"])} for node in kept]


def compare(dtype: str, repeats: int) -> None:
    plain, piped, cached = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            steps = Path(folder) / "steps.json"
            steps.write_text(json.dumps(nodes(dtype)))
            plain.append(seconds([sys.executable, "-c", PLAIN, str(ROOT / "assets"), f"{folder}/plain", str(steps)], dtype))
            command = [sys.executable, "-m", "pipeline", "recipe=quickstart", f"outputs={folder}/outputs"]
            piped.append(seconds(command, dtype))
            cached.append(seconds(command, dtype))
    for label, rows in (("plain script", plain), ("pipeline", piped), ("every stage a hit", cached)):
        wall, cpu = (median(column) for column in zip(*rows, strict=True))
        print(f"{dtype}  {label:<18} {wall:7.1f} s {cpu:7.1f} CPU s", flush=True)
    ratios = [f"{median(a[column] / b[column] for a, b in zip(piped, plain, strict=True)):.2f}" for column in (0, 1)]
    print(f"{dtype}  pipeline / script  {ratios[0]:>6}x {ratios[1]:>6}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(processor())
    for dtype in args.dtype:
        compare(dtype, args.repeats)


if __name__ == "__main__":
    main()
