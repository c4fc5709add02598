"""GPTQ: round weights so that the layer's output, not each weight, changes least."""

import math
from typing import Literal

from pydantic import Field

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint, Sensitivity
from pipeline.artifact_spec import DatasetSpec, SensitivitySpec
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, MAIN, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.backends import GPTQ_BACKENDS, Backend, backend_memory, check_backend
from stages.runtime.mixed_precision import MixedPrecisionParams, write_assignment
from stages.runtime.peak_memory import largest_layer
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, batch_memory, calibration_memory
from stages.runtime.sparsity_settings import described
from stages.runtime.stage_work import calibrated_clipping, calibrating
from stages.runtime.training_settings import check_windows


class GPTQ(Stage):
    """Round weights column by column, each time correcting the columns still to come with the inverse Hessian of the
    layer's inputs (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

    Runs llm-compressor's sequential pipeline: decoder layer by decoder layer, each calibrated on the outputs of the layers
    already quantized. It moves the layer in turn to the GPU, where there is one; the others wait in RAM or, with `offload: disk`, in
    their files. `actorder: static` visits columns by falling Hessian diagonal and keeps groups where they are, so
    it costs nothing at inference (the library's `weight` is another name for it).

    `backend` is the library that rounds: llm-compressor, or gptqmodel or auto_gptq, each in an environment of its own
    (stages/runtime/backends.py); what comes of it is the same kind of checkpoint. With `mixed_precision` each layer has the bits that a
    measured `sensitivity` gives it (stages/runtime/mixed_precision.py).
    """

    name, version = "gptq", 1
    libraries = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    lightens = {"execution.batch_size": HALVES, "execution.offload": ("disk",), "num_samples": HALVES}

    class Params(MixedPrecisionParams, CalibratedQuantization):
        actorder: Literal["static"] | None = "static"
        dampening_frac: float = Field(default=0.01, ge=0)  # of the Hessian's mean diagonal, added to its diagonal
        block_size: int = Field(default=128, ge=1)  # columns between two updates of all columns to come
        backend: Literal["llmcompressor", "gptqmodel", "auto_gptq"] = "llmcompressor"

    class Execution(CalibrationExecution):
        pass

    params: Params
    execution: Execution

    @property
    def backend(self) -> Backend | None:
        return GPTQ_BACKENDS.get(self.params.backend)

    @property
    def env(self) -> str:
        return self.backend.env if self.backend else MAIN

    @property
    def computes(self) -> bool:
        return self.backend is None  # the others compute in dtypes of their own

    def unused(self) -> frozenset[str]:
        return self.params.unused_ports

    def infer(self, model: ModelSpec, calibration: DatasetSpec, sensitivity: SensitivitySpec | None = None) -> ModelSpec:
        quantized = self.params.quantized(model, sensitivity)
        check_backend(self.backend, self.params, self.execution, model)
        check_windows(self.params.num_samples, self.params.max_length, calibration, model)
        return quantized.with_sparsity(None) if self.backend else quantized

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target, sensitivity: SensitivitySpec | None = None) -> Memory:
        """While the widest decoder layer is quantized: all Hessians of a layer are gathered in the same forward passes.

        Each batch's product is added to a Hessian. Later a weight is quantized in float32: its Hessian is normalised and its rows and
        columns reordered, in new copies; then the weight is corrected, block by block, and put in order again. On a GPU the library
        does so with as many weights of one shape as fit into three quarters of the memory that is free; one is what it needs.
        """
        quantized = self.params.quantized(model, sensitivity)
        linears = [group for group in quantized.groups if not group.format.is_dense and group.layers]
        shapes = [group.shape for group in linears]
        layer = {
            "Hessians of one layer": largest_layer(linears, lambda group: 4 * group.shape[1] ** 2),
            "working copies of one weight and its Hessian": max(4 * max(c * c, 2 * c * c + r * c, 3 * r * c) for r, c in shapes),
            "activations of one batch": batch_memory(self.params, self.params.in_memory(model), self.execution.batch_size),
        }
        changed = {name for group in linears for name in group.module_names}
        on_gpu = self.on_gpu(target)
        if self.backend:
            return backend_memory(self.backend, self.params, self.execution, model, layer, on_gpu)
        held = calibration_memory(self.params, self.params, self.execution, model, quantized, changed, {} if on_gpu else layer)
        if not on_gpu:
            return held
        return held.model_copy(update={"vram": {"one layer": largest_layer(linears, lambda group: 4 * math.prod(group.shape)), **layer}})

    def work(self, model: ModelSpec, calibration: DatasetSpec, sensitivity: SensitivitySpec | None = None) -> Work:
        """In float32, of every weight of c columns: its Hessian; two Cholesky factorizations and an inverse of that; the columns to
        come corrected after each block. Within a block each column corrects the rest of it, which is read and written."""
        quantized, p = self.params.quantized(model, sensitivity), self.params
        linears = [group for group in quantized.groups if not group.format.is_dense]
        shapes = [(group.count, *group.shape) for group in linears]
        flops = sum(n * (2 * p.tokens * c**2 + 4 / 3 * c**3 + rows * c**2) for n, rows, c in shapes)
        nbytes = sum(n * rows * c * 16 * min(p.block_size, c) / 2 for n, rows, c in shapes)
        changed = {name for group in linears for name in group.module_names}
        calibration_work = calibrating(p, p, self.execution, model, quantized, changed, calibration)
        return calibration_work + calibrated_clipping(quantized, p.ranges) + Work(float32_flops=flops, nbytes=nbytes)

    def explain(self, model: ModelSpec, calibration: DatasetSpec, sensitivity: SensitivitySpec | None = None) -> list[str]:
        said = self.params.explain_mixed(model, sensitivity)
        if model.sparsity and self.backend:
            said.append(f"zeros: {self.params.backend} corrects them too, so that they are lost ({described(model)} before)")
        elif model.sparsity:
            said.append(f"zeros stay zero ({described(model)}): they are rounded to 0, and the columns to come make that good")
        return said

    def run(
        self, ctx: Context, model: DenseCheckpoint, calibration: Dataset, sensitivity: Sensitivity | None = None
    ) -> QuantizedCheckpoint:
        params = self.params
        if self.backend:
            from stages.runtime.isolated_quantization import quantize_isolated

            names = {"num_bits", "group_size", "symmetric", "actorder", "dampening_frac"}
            settings = params.model_dump(include=names) | {"batch_size": self.execution.batch_size}
            return quantize_isolated(ctx, model, calibration, params, self.backend, settings)
        from stages.runtime.masked_gptq import MaskedGPTQ
        from stages.runtime.oneshot import GPTQWithReport, quantize_calibrated
        from stages.runtime.packing import schemes_of
        from stages.runtime.tensors import DTYPES

        measured = sensitivity.measured if sensitivity else None
        spec = params.quantized(model.model_spec, measured)
        modifier = (MaskedGPTQ if model.model_spec.sparsity else GPTQWithReport)(
            config_groups=schemes_of(spec, observer=params.ranges, scale_dtype=DTYPES[spec.dtype]),
            ignore=list(params.ignored_names(model.model_spec)),
            actorder=params.actorder,
            dampening_frac=params.dampening_frac,
            block_size=params.block_size,
        )
        made = quantize_calibrated(ctx, model, calibration, params, self.execution, [modifier], params.actorder, spec=spec)
        write_assignment(ctx.output, params, model.model_spec, measured)
        if modifier.fallbacks:
            ctx.note(
                f"{len(modifier.fallbacks)} layers were rounded to nearest because their Hessian could not be inverted: "
                f"{', '.join(modifier.fallbacks[:5])}; raise dampening_frac or num_samples"
            )
        return made
