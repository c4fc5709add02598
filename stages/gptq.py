"""GPTQ: round weights so that the layer's output, not each weight, changes least."""

import math
from typing import Literal

from pydantic import Field

from pipeline.artifact import Dataset, DatasetSpec, DenseCheckpoint, QuantizedCheckpoint
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.peak_memory import largest_layer
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, batch_memory, calibration_memory
from stages.runtime.stage_work import calibrating
from stages.runtime.training_settings import check_windows


class GPTQ(Stage):
    """Round weights column by column, each time correcting the columns still to come with the inverse Hessian of the
    layer's inputs (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

    Runs llm-compressor's sequential pipeline: decoder layer by decoder layer, each calibrated on the outputs of the layers
    already quantized. It moves the layer in turn to the GPU, where there is one; the others wait in RAM or, with `offload: disk`, in
    their files. `actorder: static` visits columns by falling Hessian diagonal and keeps groups where they are, so
    it costs nothing at inference (the library's `weight` is another name for it).
    """

    name, version = "gptq", 1
    libraries = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    lightens = {"execution.batch_size": HALVES, "execution.offload": ("disk",), "num_samples": HALVES}

    class Params(CalibratedQuantization):
        actorder: Literal["static"] | None = "static"
        dampening_frac: float = Field(default=0.01, ge=0)  # of the Hessian's mean diagonal, added to its diagonal
        block_size: int = Field(default=128, ge=1)  # columns between two updates of all columns to come

    class Execution(CalibrationExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, calibration: DatasetSpec) -> ModelSpec:
        quantized = self.params.apply(model)
        check_windows(self.params.num_samples, self.params.max_length, calibration, model)
        return quantized

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target) -> Memory:
        """While the widest decoder layer is quantized: all Hessians of a layer are gathered in the same forward passes.

        Each batch's product is added to a Hessian. Later a weight is quantized in float32: its Hessian is normalised and its rows and
        columns reordered, in new copies; then the weight is corrected, block by block, and put in order again. On a GPU the library
        does so with as many weights of one shape as fit into three quarters of the memory that is free; one is what it needs.
        """
        quantized = self.params.apply(model)
        linears = [group for group in quantized.groups if not group.format.is_dense and group.layers]
        shapes = [group.shape for group in linears]
        layer = {
            "Hessians of one layer": largest_layer(linears, lambda group: 4 * group.shape[1] ** 2),
            "working copies of one weight and its Hessian": max(4 * max(c * c, 2 * c * c + r * c, 3 * r * c) for r, c in shapes),
            "activations of one batch": batch_memory(self.params, model, self.execution.batch_size),
        }
        changed = {name for group in linears for name in group.module_names}
        on_gpu = self.on_gpu(target)
        held = calibration_memory(self.params, self.execution, model, quantized, changed, {} if on_gpu else layer)
        if not on_gpu:
            return held
        return held.model_copy(update={"vram": {"one layer": largest_layer(linears, lambda group: 4 * math.prod(group.shape)), **layer}})

    def work(self, model: ModelSpec, calibration: DatasetSpec) -> Work:
        """In float32, of every weight of c columns: its Hessian; two Cholesky factorizations and an inverse of that; the columns to
        come corrected after each block. Within a block each column corrects the rest of it, which is read and written."""
        quantized, p = self.params.apply(model), self.params
        linears = [group for group in quantized.groups if not group.format.is_dense]
        shapes = [(group.count, *group.shape) for group in linears]
        flops = sum(n * (2 * p.tokens * c**2 + 4 / 3 * c**3 + rows * c**2) for n, rows, c in shapes)
        nbytes = sum(n * rows * c * 16 * min(p.block_size, c) / 2 for n, rows, c in shapes)
        changed = {name for group in linears for name in group.module_names}
        calibration_work = calibrating(p, self.execution, model, quantized, changed, calibration)
        return calibration_work + Work(float32_flops=flops, nbytes=nbytes)

    def explain(self, model: ModelSpec, calibration: DatasetSpec) -> list[str]:
        return self.params.explain()

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset) -> QuantizedCheckpoint:
        from stages.runtime.oneshot import GPTQWithReport, quantize_calibrated
        from stages.runtime.packing import scheme_of

        params = self.params
        modifier = GPTQWithReport(
            config_groups={"group_0": scheme_of(params.format)},
            ignore=list(params.ignored_names(model.model_spec)),
            actorder=params.actorder,
            dampening_frac=params.dampening_frac,
            block_size=params.block_size,
        )
        made = quantize_calibrated(ctx, model, calibration, params, self.execution, [modifier], params.actorder)
        if modifier.fallbacks:
            ctx.note(
                f"{len(modifier.fallbacks)} layers were rounded to nearest because their Hessian could not be inverted: "
                f"{', '.join(modifier.fallbacks[:5])}; raise dampening_frac or num_samples"
            )
        return made
