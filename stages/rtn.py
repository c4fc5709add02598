"""Round-to-nearest: the baseline that every calibrated quantizer has to beat."""

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint, Sensitivity
from pipeline.artifact_spec import SensitivitySpec
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.mixed_precision import MixedPrecisionParams, write_assignment
from stages.runtime.scheme import packing_memory
from stages.runtime.stage_work import clipping, packing, publishing, reading


class RTN(Stage):
    """Round each weight to the nearest of 2**num_bits levels spread between its group's smallest and largest weight.

    `observer: mse` spreads the levels over less than that where rounding then does less harm: extreme weights are clipped to the outermost
    level (stages/runtime/clipping.py).

    No data is used. Streams tensor by tensor. The result equals llm-compressor's `QuantizationModifier`, bit for bit. With
    `mixed_precision` each layer has the bits that a measured `sensitivity` gives it (stages/runtime/mixed_precision.py).
    """

    name, version = "rtn", 1
    libraries = ("torch", "compressed-tensors")

    class Params(MixedPrecisionParams):
        """What changes the result."""

    params: Params

    def unused(self) -> frozenset[str]:
        return self.params.unused_ports

    def infer(self, model: ModelSpec, sensitivity: SensitivitySpec | None = None) -> ModelSpec:
        return self.params.quantized(model, sensitivity)

    def memory(self, model: ModelSpec, target: Target, sensitivity: SensitivitySpec | None = None) -> Memory:
        quantized = self.params.quantized(model, sensitivity)
        return packing_memory(model, quantized, writes=quantized)

    def work(self, model: ModelSpec, sensitivity: SensitivitySpec | None = None) -> Work:
        quantized = self.params.quantized(model, sensitivity)
        return reading(model) + clipping(quantized, self.params.ranges) + packing(quantized) + publishing(quantized)

    def explain(self, model: ModelSpec, sensitivity: SensitivitySpec | None = None) -> list[str]:
        return self.params.explain_mixed(model, sensitivity)

    def run(self, ctx: Context, model: DenseCheckpoint, sensitivity: Sensitivity | None = None) -> QuantizedCheckpoint:
        import torch

        from stages.runtime.clipping import group_parameters
        from stages.runtime.packing import config_of, pack_weight, packed_formats, write_quantized
        from stages.runtime.tensors import TensorReader

        source, reader, params = model.model_spec, TensorReader(model.path), self.params
        measured = sensitivity.measured if sensitivity else None
        spec, ignore = params.quantized(source, measured), params.ignored_names(source)
        formats = packed_formats(spec)

        def round_to_nearest(module: str) -> dict[str, torch.Tensor]:
            weight, form = reader.read(f"{module}.weight"), formats[module]
            return pack_weight(weight, form, *group_parameters(weight, form, params.ranges))

        write_quantized(ctx, model, spec, config_of(spec, ignore, observer=params.ranges), round_to_nearest)
        write_assignment(ctx.output, params, source, measured)
        return QuantizedCheckpoint(path=ctx.output, spec=spec)
