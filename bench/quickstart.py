"""Where the time of the quickstart goes: `python bench/quickstart.py [--dtype fp32] [--repeats 3]`.

`run recipe=quickstart` into an empty outputs folder, MLflow included; wall seconds by phase, read off the stamps of the files that every
stage leaves in the run's logs:

    start     the command until it asks for the first stage: composing, planning, the digests of model and data
    import    a stage asked for until its process begins: of the first one, torch and transformers in the fork server
    load      the process until its first report of progress: the stage's own libraries, the weights, the text
    compute   from the first report of progress to the last
    check     until the process has answered: weights written, checked and hashed
    publish   until its artifact is in the store
    record    after the last artifact: the report, its plots, MLflow

A stage that reports no progress is all `compute`. Between the artifacts the next stage is looked up, which counts as `publish`.
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

from bench.processor import processor

ROOT = Path(__file__).parents[1]
PHASES = ("start", "import", "load", "compute", "check", "publish", "record")


def run(outputs: Path, dtype: str) -> tuple[float, float, dict[str, float]]:
    """Wall seconds, CPU seconds, and the wall seconds of each phase of one run."""
    command = [sys.executable, "-m", "pipeline", "recipe=quickstart", f"outputs={outputs}"]
    before, started = sum(os.times()[2:4]), time.time()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LLMPRESS_COMPUTE_DTYPE": dtype}, capture_output=True, text=True)
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    (report,) = outputs.glob("runs/quickstart/*/report.json")
    return ended - started, sum(os.times()[2:4]) - before, phases(report, started, ended)


def phases(report: Path, started: float, ended: float) -> dict[str, float]:
    found = dict.fromkeys(PHASES, 0.0)
    at = started
    stages = [stage for stage in json.loads(report.read_text())["stages"] if stage["path"]]
    for stage in sorted(stages, key=lambda stage: stamp(Path(stage["path"]) / "artifact.json")):
        logs = report.parent / "logs" / stage["name"]
        asked, answered = stamp(logs / "request.json"), stamp(logs / "response.json")
        began = answered - json.loads((logs / "response.json").read_text())["seconds"]
        events = [json.loads(line) for line in (logs / "events.jsonl").read_text().splitlines()]
        worked = [event["time"] for event in events if event["event"] == "progress"]
        first, last = (worked[0], worked[-1]) if worked else (began, answered)
        published = stamp(Path(stage["path"]) / "artifact.json")
        ends = [("publish" if at != started else "start", asked), ("import", began), ("load", first), ("compute", last)]
        for phase, end in [*ends, ("check", answered), ("publish", published)]:
            found[phase] += end - at
            at = end
    return found | {"record": ended - at}


def stamp(file: Path) -> float:
    return file.stat().st_mtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(processor())
    print(f"{'':<6}{'wall':>8}{'CPU':>8}  " + "".join(f"{phase:>9}" for phase in PHASES), flush=True)
    for dtype in args.dtype:
        rows = []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
                rows.append(run(Path(folder), dtype))
        wall, cpu = (statistics.median(row[column] for row in rows) for column in (0, 1))
        split = [statistics.median(row[2][phase] for row in rows) for phase in PHASES]
        print(f"{dtype:<6}{wall:8.1f}{cpu:8.1f}  " + "".join(f"{seconds:9.1f}" for seconds in split), flush=True)


if __name__ == "__main__":
    main()
