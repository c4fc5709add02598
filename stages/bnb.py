"""bitsandbytes: 4-bit floats or 8-bit integers, found from the weights alone and read by transformers and vLLM as they are."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.artifact import DenseCheckpoint, QuantizedCheckpoint
from pipeline.layout import WeightFormat
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.formats import FormatQuantization, rounding_work
from stages.runtime.scheme import packing_memory

THRESHOLD = 6.0  # the paper's, and transformers' default


class BitsAndBytes(Stage):
    """`nf4` and `fp4`: each weight becomes the nearest of 16 values, scaled by the largest magnitude of its 64 (Dettmers et al., 2023,
    https://arxiv.org/abs/2305.14314). Those of nf4 are quantiles of a normal distribution, those of fp4 are floats of 2 bits of exponent
    and 1 of mantissa. `double_quant` stores the scales in 8 bits: 4.13 bits for a weight instead of 4.5.

    `int8`: each row scaled to 127. While the model computes, inputs are rounded too, token by token, but for the columns in which one
    reaches `llm_int8_threshold`, which stay in 16 bits (LLM.int8(), Dettmers et al., 2022, https://arxiv.org/abs/2208.07339). Which columns
    these are depends on the tokens that are computed together, so that losses change a little with the batch size.

    No data is used. Streams tensor by tensor, as transformers would quantize while loading, and writes what it would save: the 4-bit
    JSON beside a weight alone is padded to a known length.
    """

    name, version = "bnb", 1
    libraries = ("torch", "bitsandbytes")

    class Params(FormatQuantization):
        format: Literal["nf4", "fp4", "int8"] = "nf4"
        double_quant: bool = False
        llm_int8_threshold: float = Field(default=THRESHOLD, ge=0)  # 0: all columns are rounded

        @model_validator(mode="after")
        def _has_an_effect(self) -> "BitsAndBytes.Params":
            if self.format == "int8" and self.double_quant:
                raise ValueError(
                    "double_quant: int8 has one scale for each row and nothing to quantize twice; leave it out or write format: nf4"
                )
            if self.format != "int8" and self.llm_int8_threshold != THRESHOLD:
                raise ValueError(f"llm_int8_threshold: {self.format} does not round inputs; leave it out or write format: int8")
            return self

        @property
        def stored(self) -> WeightFormat:
            if self.format == "int8":
                return WeightFormat.of("llm_int8", threshold=self.llm_int8_threshold)
            return WeightFormat.of(self.format, double_quant=self.double_quant)

    params: Params

    def infer(self, model: ModelSpec) -> ModelSpec:
        return self.params.apply(model)

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        quantized = self.params.apply(model)
        return packing_memory(model, quantized, writes=quantized)

    def work(self, model: ModelSpec) -> Work:
        return rounding_work(model, self.params.apply(model))

    def explain(self, model: ModelSpec) -> list[str]:
        if self.params.format == "int8":
            return [
                "losses of an LLM.int8() model depend a little on the batch: which inputs stay in 16 bits is decided for all of its tokens"
            ]
        return []

    def run(self, ctx: Context, model: DenseCheckpoint) -> QuantizedCheckpoint:
        from stages.runtime.bitsandbytes_weights import config_of, pack
        from stages.runtime.packing import write_quantized
        from stages.runtime.tensors import TensorReader

        spec, form, reader = self.params.apply(model.model_spec), self.params.stored, TensorReader(model.path)
        write_quantized(ctx, model, spec, config_of(form, spec), lambda module: pack(reader.read(f"{module}.weight"), form))
        return QuantizedCheckpoint(path=ctx.output, spec=spec)
