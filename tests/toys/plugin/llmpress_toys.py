"""Stages that do, on demand, what real ones do by accident. Installed as a plugin: `find_stage` sees them by their entry point."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.artifact import Checkpoint, DenseCheckpoint, EvalReport
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target


class Toy(Stage):
    """Writes a report, or ends in the way that `action` names."""

    name, version = "toy", 1

    class Params(Stage.Params):
        action: Literal[
            "write", "raise", "refuse", "allocate", "allocate_torch", "fill_disk", "exit", "kill", "leave_child", "stop", "hold_gil",
            "slow", "wrong_type", "wrong_place", "no_disk", "abort", "threads", "stop_with_child", "as_planned",
        ] = "write"  # fmt: skip
        witness: str = ""  # a file that gets the pid of every process that runs this stage, or that it leaves behind
        value: float = 1.0

    def infer(self, model: ModelSpec, other: object = None) -> None:
        return None

    def memory(self, model: ModelSpec, target: Target, other: object = None) -> Memory:
        return Memory(ram={"everything": 100_000_000}, disk={"report": 10**18 if self.params.action == "no_disk" else 1000})

    def run(self, ctx: Context, model: Checkpoint, other: EvalReport | None = None) -> EvalReport:
        self.bear_witness(os.getpid())
        print("toy runs", self.params.action)
        getattr(self, f"_{self.params.action}", lambda ctx: None)(ctx)
        if self.params.action == "wrong_type":
            return model  # type: ignore[return-value]
        ctx.note("a note from the worker")
        (ctx.output / "report.json").write_text("{}")
        return EvalReport(ctx.output / "sub" if self.params.action == "wrong_place" else ctx.output, metrics={"value": self.params.value})

    def bear_witness(self, pid: int) -> None:
        if self.params.witness:
            with open(self.params.witness, "a") as stream:
                stream.write(f"{pid}\n")

    def _raise(self, ctx: Context) -> None:
        (ctx.output / "half").write_text("made")
        raise KeyError("no such layer")

    def _refuse(self, ctx: Context) -> None:
        raise ValueError("the calibration text has 3 windows, 128 were asked for; give more text")

    def _allocate(self, ctx: Context) -> None:
        bytearray(8 << 30)

    def _as_planned(self, ctx: Context) -> None:
        held = bytearray(b"x") * 100_000_000  # every page written
        assert held[-1]

    def _allocate_torch(self, ctx: Context) -> None:
        import torch

        torch.ones(1 << 31)

    def _fill_disk(self, ctx: Context) -> None:
        with open(ctx.output / "weights", "wb") as stream:
            for _ in range(64):
                stream.write(bytes(1 << 20))

    def _exit(self, ctx: Context) -> None:
        os._exit(7)  # as native code does that calls exit()

    def _kill(self, ctx: Context) -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    def _leave_child(self, ctx: Context) -> None:
        self.bear_witness(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid)

    def _stop_with_child(self, ctx: Context) -> None:
        self._leave_child(ctx)
        self._stop(ctx)

    def _abort(self, ctx: Context) -> None:
        os.abort()

    def _threads(self, ctx: Context) -> None:
        print("torch was imported:", "torch" in sys.modules)
        import numpy
        import torch

        left = torch.ones(300, 300)
        assert (left @ left)[0, 0] == 300  # OpenMP's pool
        assert (numpy.ones((300, 300)) @ numpy.ones((300, 300)))[0, 0] == 300  # OpenBLAS's pool

    def _stop(self, ctx: Context) -> None:
        time.sleep(3600)

    def _hold_gil(self, ctx: Context) -> None:
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the GIL during the call, as some extensions do

    def _slow(self, ctx: Context) -> None:
        for done in range(1000):
            ctx.progress("item", done + 1, 1000)
            time.sleep(0.001)
        ctx.curve(1, loss=2.5)


class ToyCopy(Stage):
    """The same checkpoint again; `damage` cuts its weights short."""

    name, version = "toy_copy", 1

    class Params(Stage.Params):
        damage: bool = False

    def infer(self, model: ModelSpec) -> ModelSpec:
        return model

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        return Memory()

    def run(self, ctx: Context, model: DenseCheckpoint) -> DenseCheckpoint:
        return copy(model, ctx.output, self.params.damage)


@dataclass(frozen=True)
class Pair:
    model: ModelSpec
    report: None


@dataclass(frozen=True)
class PairOutputs:
    model: DenseCheckpoint
    report: EvalReport


class ToyPair(Stage):
    """Two outputs."""

    name, version = "toy_pair", 1

    def infer(self, model: ModelSpec) -> Pair:
        return Pair(model, None)

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        return Memory()

    def run(self, ctx: Context, model: DenseCheckpoint) -> PairOutputs:
        (ctx.output / "report").mkdir()
        (ctx.output / "report" / "report.json").write_text("{}")
        report = EvalReport(ctx.output / "report", metrics={"loss": 2.0})
        return PairOutputs(copy(model, ctx.output / "model", damage=False), report)


class ToyResume(Stage):
    """Is killed halfway at the first attempt and continues at the second."""

    name, version, resumes = "toy_resume", 1, True

    def infer(self, model: ModelSpec) -> None:
        return None

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        return Memory()

    def run(self, ctx: Context, model: Checkpoint) -> EvalReport:
        half = ctx.output / "half"
        if not half.exists():
            half.write_text("made by the first attempt")
            os.kill(os.getpid(), signal.SIGKILL)
        return EvalReport(ctx.output)


def copy(model: DenseCheckpoint, folder: Path, damage: bool) -> DenseCheckpoint:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model.path / name, folder / name)
    if damage:
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 2)
    return DenseCheckpoint(folder)
