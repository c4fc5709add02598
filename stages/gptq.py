"""GPTQ: round weights so that the layer's output, not each weight, changes least."""

from typing import Literal

from pydantic import Field

from pipeline.artifact import Dataset, DatasetSpec, DenseCheckpoint, QuantizedCheckpoint
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, batch_memory, calibration_memory, probe_memory


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

    class Params(CalibratedQuantization):
        actorder: Literal["static"] | None = "static"
        dampening_frac: float = Field(default=0.01, ge=0)  # of the Hessian's mean diagonal, added to its diagonal
        block_size: int = Field(default=128, ge=1)  # columns between two updates of all columns to come

    class Execution(CalibrationExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, calibration: DatasetSpec) -> ModelSpec:
        return self.params.apply(model)

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target) -> Memory:
        """While the widest decoder layer is quantized: all Hessians of a layer are gathered in the same forward passes."""
        quantized = self.params.apply(model)
        linears = [group for group in quantized.groups if not group.format.is_dense and group.layers]
        hessians = sum(4 * group.shape[1] ** 2 for group in linears)
        working = max((4 * max(g.shape[1] ** 2 + 3 * g.shape[0] * g.shape[1], 3 * g.shape[1] ** 2) for g in linears), default=0)
        layer = {
            "Hessians of one layer": hessians,
            "working copies of one weight and its Hessian": working,
            "activations of one batch": batch_memory(self.params, model, self.execution.batch_size),
        }
        changed = {name for group in linears for name in group.module_names}
        held = calibration_memory(self.params, self.execution, model, quantized, changed)
        if self.on_gpu(target):
            vram = {"one layer": sum(4 * g.shape[0] * g.shape[1] for g in linears), **layer}
            return held.model_copy(update={"ram": held.ram | probe_memory(model), "vram": vram})
        return held.model_copy(update={"ram": held.ram | layer})

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
