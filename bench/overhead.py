"""What the pipeline costs over a plain script that calls the same stages: `python bench/overhead.py [--repeats 3]`.

The plain script is one process that imports the libraries once and calls each stage's own function, in the same order, on the
same data, with no graph, store, hashes, workers or tracking. The pipeline is `run recipe=quickstart` into an empty outputs
folder, MLflow included. The two alternate in one run, since machines are noisy; the figures are medians. Then the same command
again: every stage a hit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAIN = """
import sys
from pathlib import Path
from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.stage import Context, find_stage
assets, out = Path(sys.argv[1]), Path(sys.argv[2])
def run(name, params, **inputs):
    folder = out / name
    folder.mkdir(parents=True)
    return find_stage(name.partition("-")[0]).from_dict(params).run(Context(folder, lambda event: None), **inputs)
source = DenseCheckpoint(assets / "small-llama")
text = {split: Dataset(assets / "data" / f"{split}.jsonl") for split in ("calibration", "eval")}
run("evaluate-source", {}, model=source, eval=text["eval"])
pruned = run("structured_prune", PRUNE, model=source, **({"calibration": text["calibration"]} if CALIBRATED else {}))
packed = run("gptq", QUANTIZE, model=pruned, calibration=text["calibration"])
run("evaluate-final", {}, model=packed, eval=text["eval"], reference=source)
"""


def seconds(command: list[str]) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - started


def plain_script() -> str:
    """The script with the parameters that the quickstart recipe composes to."""
    command = [sys.executable, "-m", "pipeline", "recipe=quickstart", "mode=plan", "format=json"]
    nodes = {node["name"]: node for node in json.loads(subprocess.check_output(command, cwd=ROOT))["nodes"]}
    prune, quantize = ({k: v for k, v in nodes[name]["params"].items() if v is not None} for name in ("prune", "quantize"))
    calibrated = "calibration" in nodes["prune"]["inputs"]
    return PLAIN.replace("PRUNE", repr(prune)).replace("QUANTIZE", repr(quantize)).replace("CALIBRATED", repr(calibrated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    script, plain, piped, cached = plain_script(), [], [], []
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            plain.append(seconds([sys.executable, "-c", script, str(ROOT / "assets"), f"{folder}/plain"]))
            command = [sys.executable, "-m", "pipeline", "recipe=quickstart", f"outputs={folder}/outputs"]
            piped.append(seconds(command))
            cached.append(seconds(command))
        print(f"{repeat + 1}: plain script {plain[-1]:.1f} s, pipeline {piped[-1]:.1f} s, all hits {cached[-1]:.2f} s", flush=True)
    base, full = statistics.median(plain), statistics.median(piped)
    print(f"median: plain script {base:.1f} s, pipeline {full:.1f} s: {full - base:+.1f} s, {100 * (full / base - 1):+.1f} %")
    print(f"median with every stage a hit: {statistics.median(cached):.2f} s")


if __name__ == "__main__":
    main()
