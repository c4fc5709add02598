"""Run a stage in several processes, each on a device of its own, started by accelerate's launcher as its configuration file says.

    <folder>/job.json        the stage, its parameters and its inputs
    <folder>/events.jsonl    what process 0 reports; the worker passes it on
    <folder>/error-<n>.json  why process n failed
    <folder>/metrics.json    of the result, which process 0 has written to the stage's output

Every process calls the stage's own `run`; what is done once only (writing, reporting) asks stages/runtime/processes.py. Worker >
launcher > processes: each is killed by the kernel when the one before it dies.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.artifact import TYPES, Artifact
from pipeline.artifact_spec import Spec
from pipeline.layout import Frozen
from pipeline.parent import end_with_parent
from pipeline.stage import Context, Stage, find_stage

POLL = 0.1  # seconds between two looks at the events
LAUNCHER = "LLMPRESS_LAUNCHER"  # environment variable: the process id that the processes must not outlive
MEMBER = "stages.runtime.launch"  # the module that each process runs
SHARDED = {  # what is relied on of `fsdp_config`; each has another default in one of accelerate's versions
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # layer by layer
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # checkpoints: each process writes its part
    "fsdp_cpu_ram_efficient_loading": False,  # true leaves the teacher's weights at zero in all processes but the first
    "fsdp_activation_checkpointing": False,  # that is execution.gradient_checkpointing, and renames the weights
}


class Processes(Frozen):
    """What a plan needs to know of accelerate's configuration file."""

    count: int
    sharded: bool  # FSDP: each holds a part of the weights

    @property
    def shards(self) -> int:
        return self.count if self.sharded else 1


ALONE = Processes(count=1, sharded=False)


class Input(Frozen):
    type: str
    path: Path
    key: str
    spec: Spec


class Job(Frozen):
    stage: str
    params: dict[str, Any]
    execution: dict[str, Any]
    output: Path
    inputs: dict[str, Input | None]


def read_config(file: str) -> Processes:
    """ValueError where the file cannot be read, or asks for what the training loop cannot do."""
    import yaml  # here: a stage file imports this module, and the interpreter of an isolated backend has no yaml

    where = f"execution.accelerate_config: {file}"
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        kind, count = content["distributed_type"], int(content["num_processes"])
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is no configuration of accelerate ({type(error).__name__}); write it with `accelerate config`") from None
    if kind not in ("MULTI_GPU", "FSDP") or count < 2:
        raise ValueError(f"{where} has distributed_type {kind} and {count} processes; write MULTI_GPU or FSDP, and 2 processes or more")
    if content.get("num_machines", 1) != 1:
        raise ValueError(f"{where} has {content['num_machines']} machines; a stage runs on one, write num_machines: 1")
    given = content.get("fsdp_config") or {}
    for name, value in SHARDED.items() if kind == "FSDP" else ():
        if given.get(name) != value:
            raise ValueError(f"{where} has fsdp_config.{name} {json.dumps(given.get(name))}; write {name}: {json.dumps(value)}")
    return Processes(count=count, sharded=kind == "FSDP")


def launch(ctx: Context, stage: Stage, config: str, inputs: Mapping[str, Artifact | None], folder: Path) -> dict[str, float]:
    """Run `stage` without its `accelerate_config` in the processes of `config`; its metrics. `folder` is for this alone.

    ValueError with the sentence of the process that failed by one, RuntimeError for any other end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()
    job = Job(
        stage=stage.name,
        params=stage.params.model_dump(mode="json"),
        execution=stage.execution.model_dump(mode="json", exclude={"accelerate_config", "memory_limit"}),  # the limit is inherited
        output=ctx.output,
        inputs={port: _as_input(given) if given else None for port, given in inputs.items()},
    )
    (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "stages.runtime.launch", str(os.getpid()), config, MEMBER, str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"})  # no module comes from the working folder
    try:
        code = _pass_on(ctx, process, folder / "events.jsonl")
    finally:
        process.kill()
        process.wait()
    if code:
        raise _failure(folder, code)
    metrics: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return metrics


def _as_input(given: Artifact) -> Input:
    return Input(type=type(given).__name__, path=given.path, key=given.key, spec=given.spec)


def _pass_on(ctx: Context, process: "subprocess.Popen[bytes]", file: Path) -> int:
    """Emit the events of `file` until the launcher ends; its exit status."""
    file.touch()
    code, rest = None, ""
    with open(file, encoding="utf-8") as events:
        while code is None:
            try:
                code = process.wait(POLL)
            except subprocess.TimeoutExpired:
                code = None
            *lines, rest = (rest + events.read()).split("\n")
            for line in lines:
                ctx.emit(json.loads(line))
    return code


def _failure(folder: Path, code: int) -> Exception:
    files = sorted(folder.glob("error-*.json"), key=lambda file: file.stat().st_mtime_ns)
    errors = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    errors.sort(key=lambda error: not error["input"])  # after one has failed, the others fail for want of it
    if not errors:
        return RuntimeError(f"the processes of accelerate ended with exit status {code}; the log says why")
    return (ValueError if errors[0]["input"] else RuntimeError)(errors[0]["text"])


def start(parent: str, config: str, member: str, folder: str) -> None:
    """The launcher: accelerate's, in a process that dies with the worker."""
    end_with_parent(int(parent))
    from accelerate.commands.launch import launch_command, launch_command_parser

    os.environ[LAUNCHER] = str(os.getpid())
    port = ["--main_process_port", "0"]  # any that is free: two runs may train at once
    launch_command(launch_command_parser().parse_args(["--config_file", config, *port, "-m", member, folder]))


def take_part(folder: Path) -> None:
    """One of the processes: run the stage of the job."""
    end_with_parent(int(os.environ[LAUNCHER]))
    from accelerate import PartialState

    from stages.runtime.loading import resolve_device

    job = Job.model_validate_json((folder / "job.json").read_bytes())
    index = int(os.environ["RANK"])
    try:
        on_cpu = resolve_device(job.execution["device"]).type == "cpu"
        PartialState(cpu=on_cpu, timeout=timedelta(hours=2))  # joins the others, and takes the device of its number
        stage = find_stage(job.stage).from_dict(job.params, job.execution)
        inputs = {port: given and TYPES[given.type](given.path, given.spec, given.key) for port, given in job.inputs.items()}
        with open(folder / "events.jsonl" if index == 0 else os.devnull, "a", encoding="utf-8") as stream:

            def emit(event: dict[str, Any]) -> None:
                stream.write(json.dumps(event, default=float) + "\n")
                stream.flush()

            made = stage.run(Context(job.output, emit), **inputs)
    except Exception as error:
        what = {"input": isinstance(error, ValueError), "text": str(error) or type(error).__name__}
        (folder / f"error-{index}.json").write_text(json.dumps(what), encoding="utf-8")
        raise
    if index == 0:
        (folder / "metrics.json").write_text(json.dumps(made.metrics), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        start(*sys.argv[1:])
    else:
        take_part(Path(sys.argv[1]))
