"""Truncate the rank of the MLP's down projections: the smallest singular values go, the matrices stay dense."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.artifact import DenseCheckpoint
from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target

if TYPE_CHECKING:
    import torch

TRUNCATED = ".mlp.down_proj.weight"


class LowRank(Stage):
    """Replace each down projection by the nearest matrix of a lower rank (Eckart and Young, 1936,
    https://doi.org/10.1007/BF02288367): of its singular values, the largest that hold `energy` of the sum of squares.

    The checkpoint keeps its size; what the truncation costs in quality is what a factorization of these layers would cost.
    Metric: `mean_rank`.
    """

    name, version = "low_rank", 1
    libraries = ("torch",)

    class Params(Stage.Params):
        energy: float = Field(default=0.99, gt=0, lt=1)  # of the sum of squared singular values, kept

    class Execution(Stage.Execution):
        device: Literal["auto", "cpu", "cuda"] = "auto"

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec) -> ModelSpec:
        return model

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        a = model.architecture
        factors = {"one matrix and its singular vectors": 4 * 4 * a.hidden_size * (a.hidden_size + a.intermediate_size)}
        written = {"the matrix as it is read and written": 2 * a.hidden_size * a.intermediate_size * ITEM_BYTES[model.dtype]}
        disk = {"checkpoint": model.nbytes}
        if self.on_gpu(target):
            return Memory(vram=factors, ram=written, disk=disk)
        return Memory(ram=factors | written, disk=disk)

    def run(self, ctx: Context, model: DenseCheckpoint) -> DenseCheckpoint:
        from stages.runtime.loading import resolve_device
        from stages.runtime.tensors import CheckpointWriter, TensorReader, copy_companions

        reader, device, ranks = TensorReader(model.path), resolve_device(self.execution.device), []
        tensors = model.model_spec.tensors()
        with CheckpointWriter(ctx.output, tensors) as writer:  # tensor by tensor: the model is never in memory
            for done, name in enumerate(tensors, 1):
                if name.endswith(TRUNCATED):
                    weight, rank = truncate(reader.read(name).to(device), self.params.energy)
                    writer.add(name, weight.cpu())
                    ranks.append(rank)
                else:
                    writer.copy(name, reader)
                ctx.progress("truncating", done, len(tensors))
        copy_companions(model.path, ctx.output, model.config)
        full = min(model.model_spec.architecture.hidden_size, model.model_spec.architecture.intermediate_size)
        ctx.note(f"ranks kept of {full}: {', '.join(map(str, ranks))}")
        return DenseCheckpoint(ctx.output, model.spec, metrics={"mean_rank": sum(ranks) / len(ranks)})


def truncate(weight: "torch.Tensor", energy: float) -> "tuple[torch.Tensor, int]":
    """[out, in] weight to (the nearest of lower rank, rounded to the same dtype; that rank). ValueError where it holds nan or inf."""
    import torch

    if not weight.isfinite().all():
        raise ValueError("a down projection holds nan or inf; the checkpoint is damaged, copy it again")
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    held = (s**2).cumsum(0) / (s**2).sum()
    rank = int((held < energy).sum()) + 1
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype), rank
