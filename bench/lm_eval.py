"""Is the stage lm_eval at least as fast as lm-evaluation-harness is by itself?

    python bench/lm_eval.py [--model FOLDER] [--tasks FOLDER] [--names a,b] [--batch-size 16] [--repeats 1] [--limit N]

Three ways to the same answers, in turn, each in a process of its own on the same model, tasks and batch size:

    command    `lm_eval --model hf --include_path ...`, which first looks through all the harness' own task files
    library    the harness' model class and `evaluate` on the folder's tasks alone
    stage      this project's stage, as a worker runs it: load, check, answer, standard errors, samples written

Seconds are of the whole process, imports included, the fastest of the repeats; CPU seconds beside them, since other work on the machine
stretches only the former. The scores are printed: the harness takes logarithms in the model's dtype, the stage in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
COMMAND = "import stages.runtime.task_metrics; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
LIBRARY = """
import json, sys
import torch
import stages.runtime.task_metrics
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, names, size, limit = json.loads(sys.argv[1])
lm = HFLM(pretrained=model, batch_size=size, device="cpu")
manager = TaskManager(include_path=folder, include_defaults=False)
found = simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, limit=limit)["results"]
scores = {(task, key.split(",")[0]): value for task, row in found.items() for key, value in row.items() if "," in key}
print("FOUND", json.dumps({"/".join(name): value for name, value in scores.items()}))
"""
STAGE = """
import json, sys
from pathlib import Path
from pipeline.artifact import Checkpoint, Dataset
from pipeline.stage import Context
from stages.lm_eval import LMEval
model, folder, names, size, limit, output = json.loads(sys.argv[1])
stage = LMEval.from_dict({"tasks": names, "limit": limit}, {"device": "cpu", "batch_size": size})
report = stage.run(Context(Path(output), lambda event: None), Checkpoint(Path(model)), Dataset(Path(folder)))
print("FOUND", json.dumps(report.metrics))
"""


def resolved_copy(folder: Path, target: Path) -> Path:
    """The task files with absolute paths to their data, which the harness needs."""
    target.mkdir()
    for file in folder.glob("*.yaml"):
        task: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str((folder / name).resolve()) for split, name in files.items()}
        (target / file.name).write_text(yaml.safe_dump(task), encoding="utf-8")
    return target


def timed(arguments: list[str], log: Path) -> tuple[float, float, str]:
    """Wall and CPU seconds, and what was printed."""
    before, started = os.times(), time.perf_counter()
    with open(log, "w", encoding="utf-8") as errors:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode:
        sys.exit(f"failed: {log.read_text(encoding='utf-8')[-3000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used, done.stdout


def command_scores(folder: Path) -> dict[str, float]:
    results = json.loads(max(folder.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    return {f"{task}/{key.split(',')[0]}": value for task, row in results.items() for key, value in row.items() if "," in key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets/small-llama")
    parser.add_argument("--tasks", type=Path, default=ROOT / "assets/tasks")
    parser.add_argument("--names", default="next_line,bracket_close,python_validity")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    model, names = str(options.model.resolve()), options.names.split(",")
    times: dict[str, list[tuple[float, float]]] = {"command": [], "library": [], "stage": []}
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        folder = str(resolved_copy(options.tasks, here / "tasks"))
        for repeat in range(options.repeats):
            output = here / f"stage{repeat}"
            output.mkdir()
            asked = [model, folder, names, options.batch_size, options.limit]
            flags = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", options.names, "--include_path", folder]
            flags += ["--batch_size", str(options.batch_size), "--device", "cpu", "--output_path", str(here / f"cli{repeat}")]
            flags += ["--limit", str(options.limit)] if options.limit else []
            stage_asked = [model, str(options.tasks.resolve()), *asked[2:], str(output)]
            runs = {
                "stage": ["-c", STAGE, json.dumps(stage_asked)],
                "library": ["-c", LIBRARY, json.dumps(asked)],
                "command": ["-c", COMMAND, "run", *flags],
            }
            for name, arguments in runs.items():
                wall, cpu, printed = timed(arguments, here / f"{name}.log")
                times[name].append((wall, cpu))
                found = printed.rpartition("FOUND ")[2]
                scores[name] = command_scores(here / f"cli{repeat}") if name == "command" else json.loads(found)
    metrics = [name for name in scores["stage"] if not name.endswith("_stderr")]
    print(f"{'':<10}{'seconds':>9}{'CPU s':>8}  " + "".join(f"{name:>34}" for name in metrics))
    for name in times:
        wall, cpu = (min(column) for column in zip(*times[name], strict=True))
        print(f"{name:<10}{wall:>9.1f}{cpu:>8.1f}  " + "".join(f"{scores[name][metric]:>34.4f}" for metric in metrics))


if __name__ == "__main__":
    main()
