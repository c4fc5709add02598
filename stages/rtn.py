"""Round-to-nearest: the baseline that every calibrated quantizer has to beat."""

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.scheme import WeightQuantization, packing_memory
from stages.runtime.stage_work import packing, publishing, reading


class RTN(Stage):
    """Round each weight to the nearest of 2**num_bits levels spread between its group's smallest and largest weight.

    No data is used. Streams tensor by tensor. The result equals llm-compressor's `QuantizationModifier`, bit for bit.
    """

    name, version = "rtn", 1
    libraries = ("torch", "compressed-tensors")

    class Params(WeightQuantization):
        """What changes the result."""

    params: Params

    def infer(self, model: ModelSpec) -> ModelSpec:
        return self.params.apply(model)

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        quantized = self.params.apply(model)
        return packing_memory(model, quantized, writes=quantized)

    def work(self, model: ModelSpec) -> Work:
        quantized = self.params.apply(model)
        return reading(model) + packing(quantized) + publishing(quantized)

    def explain(self, model: ModelSpec) -> list[str]:
        return self.params.explain()

    def run(self, ctx: Context, model: DenseCheckpoint) -> QuantizedCheckpoint:
        import torch

        from stages.runtime.packing import min_max_parameters, pack_weight, quantization_config, write_quantized
        from stages.runtime.tensors import TensorReader

        source, form, reader = model.model_spec, self.params.format, TensorReader(model.path)

        def round_to_nearest(module: str) -> dict[str, torch.Tensor]:
            weight = reader.read(f"{module}.weight")
            return pack_weight(weight, form, *min_max_parameters(weight, form))

        spec = self.params.apply(source)
        write_quantized(ctx, model, spec, quantization_config(form, self.params.ignored_names(source)), round_to_nearest)
        return QuantizedCheckpoint(path=ctx.output, spec=spec)
