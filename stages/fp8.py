"""FP8: weights and inputs in eight bits of floating point, which recent GPUs multiply as they are."""

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.layout import WeightFormat
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.formats import FormatQuantization, rounding_work
from stages.runtime.scheme import packing_memory


class FP8(Stage):
    """Round each weight to e4m3 (4 bits of exponent, 3 of mantissa; Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433) after
    scaling its row to the largest value that has, 448. While the model computes, each token's inputs are rounded in the same way.

    No data is used. Streams tensor by tensor. The result equals llm-compressor's scheme `FP8_DYNAMIC`, bit for bit. A CPU, and a GPU of
    compute capability below 8.9, has no FP8 product: transformers rounds what it multiplies and computes in the model's dtype.
    """

    name, version = "fp8", 1
    libraries = ("torch", "compressed-tensors")

    class Params(FormatQuantization):
        """What changes the result."""

        @property
        def stored(self) -> WeightFormat:
            return WeightFormat.of("float-quantized")

    params: Params

    def infer(self, model: ModelSpec) -> ModelSpec:
        return self.params.apply(model)

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        quantized = self.params.apply(model)
        return packing_memory(model, quantized, writes=quantized)

    def work(self, model: ModelSpec) -> Work:
        return rounding_work(model, self.params.apply(model))

    def run(self, ctx: Context, model: DenseCheckpoint) -> QuantizedCheckpoint:
        from stages.runtime.packing import rounded_to_nearest

        return rounded_to_nearest(ctx, model, self.params.apply(model.model_spec), self.params.ignored_names(model.model_spec))
