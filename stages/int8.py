"""INT8: weights in eight bits, and with W8A8 the inputs too, which most GPUs multiply as integers."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.headers import ITEM_BYTES
from pipeline.layout import WeightFormat
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.formats import FormatQuantization, rounding_work
from stages.runtime.peak_memory import layer_bytes
from stages.runtime.scheme import CalibrationExecution, CalibrationWindows, batch_memory, calibration_memory, packing_memory
from stages.runtime.smoothing import norm_smoothings
from stages.runtime.stage_work import calibrating
from stages.runtime.training_settings import check_windows

CALIBRATION = {"num_samples": 128, "max_length": 256}  # of SmoothQuant, where the recipe does not say


class Int8(Stage):
    """Round each weight to one of 255 levels, evenly spaced up to its row's largest magnitude.

    `W8A8` rounds each token's inputs in the same way while the model computes (LLM.int8()'s vector-wise scheme without its outliers);
    `W8A16` leaves them as they are. Groups finer than a row are `rtn` with 8 bits.

    With `smoothing_strength` a, input channels with large values are first divided by s = max|x|^a / max|w|^(1 - a) and their weights
    multiplied by it (SmoothQuant, Xiao et al., 2022, https://arxiv.org/abs/2211.10438), so that a token's scale is not that of a few
    outliers. The division is folded into the norms before the attention and the MLP. That needs calibration text, and runs
    llm-compressor's sequential pipeline; without it no data is used, and the stage streams tensor by tensor. Either way the rounding
    equals llm-compressor's, bit for bit.
    """

    name, version = "int8", 1
    libraries: tuple[str, ...] = ("torch", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.offload": ("disk",), "num_samples": HALVES}

    class Params(Computing, FormatQuantization):
        scheme: Literal["W8A8", "W8A16"] = "W8A8"
        smoothing_strength: float | None = Field(default=None, gt=0, lt=1)  # 0.5 is usual; None: no smoothing
        num_samples: int | None = Field(default=None, ge=1)  # smoothing: calibration windows, 128 if not given ...
        max_length: int | None = Field(default=None, ge=2)  # ... of so many tokens, 256 if not given

        @model_validator(mode="before")
        @classmethod
        def _calibrate_where_smoothed(cls, given: Any) -> Any:
            """What is not given is filled in here, so that it is part of the key of a smoothed model and of no other."""
            if not isinstance(given, dict) or given.get("smoothing_strength") is None:
                return given
            return given | {name: value for name, value in CALIBRATION.items() if given.get(name) is None}

        @model_validator(mode="after")
        def _has_an_effect(self) -> "Int8.Params":
            if self.scheme == "W8A16" and self.smoothing_strength is not None:
                raise ValueError(
                    "smoothing_strength: W8A16 does not round inputs, so smoothing has no use; leave it out or write scheme: W8A8"
                )
            given = [name for name in CALIBRATION if getattr(self, name) is not None]
            if given and self.smoothing_strength is None:
                raise ValueError(f"{given[0]}: without smoothing nothing is calibrated; leave it out or write smoothing_strength: 0.5")
            return self

        @property
        def windows(self) -> CalibrationWindows:
            """Of a smoothed model."""
            assert self.num_samples and self.max_length, "filled in above"
            return CalibrationWindows(self.num_samples, self.max_length)

        @property
        def stored(self) -> WeightFormat:
            return WeightFormat.of("int-quantized") if self.scheme == "W8A8" else WeightFormat(num_bits=8)

    class Execution(CalibrationExecution):
        pass

    params: Params
    execution: Execution

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        super().__init__(params, execution)
        if self.params.smoothing_strength is not None:
            self.libraries = (*self.libraries, "transformers", "llmcompressor")

    @property
    def computes(self) -> bool:
        return self.params.smoothing_strength is not None

    def unused(self) -> frozenset[str]:
        return frozenset({"calibration"}) if self.params.smoothing_strength is None else frozenset()

    def infer(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> ModelSpec:
        quantized = self.params.apply(model)
        if self.params.smoothing_strength is not None:
            if calibration is None:
                raise ValueError(
                    "calibration: smoothing needs a calibration set; give data.splits.calibration or leave smoothing_strength out"
                )
            windows = self.params.windows
            check_windows(windows.num_samples, windows.max_length, calibration, model)
        return quantized

    def memory(self, model: ModelSpec, target: Target, calibration: DatasetSpec | None = None) -> Memory:
        """Smoothing changes one group of layers after another, of which each is multiplied into a new copy."""
        quantized = self.params.apply(model)
        if self.params.smoothing_strength is None:
            return packing_memory(model, quantized, writes=quantized)
        in_memory = self.params.in_memory(model)
        layer = {
            "a smoothed copy of one layer's largest weight": largest_weight(in_memory),
            "activations of one batch": batch_memory(self.params.windows, in_memory, self.execution.batch_size),
        }
        on_gpu, changed = self.on_gpu(target), smoothed(quantized)
        held = calibration_memory(self.params.windows, self.params, self.execution, model, quantized, changed, {} if on_gpu else layer)
        return held.model_copy(update={"vram": {"one layer": layer_bytes(in_memory), **layer}}) if on_gpu else held

    def work(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> Work:
        quantized = self.params.apply(model)
        if calibration is None:
            return rounding_work(model, quantized)
        return calibrating(self.params.windows, self.params, self.execution, model, quantized, smoothed(quantized), calibration)

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset | None = None) -> QuantizedCheckpoint:
        from stages.runtime.packing import rounded_to_nearest

        spec, ignore = self.params.apply(model.model_spec), self.params.ignored_names(model.model_spec)
        if calibration is None:
            return rounded_to_nearest(ctx, model, spec, ignore)
        return self._smooth(ctx, model, calibration, spec, ignore)

    def _smooth(
        self, ctx: Context, model: DenseCheckpoint, calibration: Dataset, spec: ModelSpec, ignore: tuple[str, ...]
    ) -> QuantizedCheckpoint:
        """Apart from `run`, because these imports bring transformers and llm-compressor, which rounding alone does without."""
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform import SmoothQuantModifier

        from stages.runtime.oneshot import calibrate
        from stages.runtime.packing import quantization_config, scheme_of
        from stages.runtime.tensors import DTYPES

        form, mappings = self.params.stored, [[list(pair.balance), pair.smooth] for pair in norm_smoothings(spec)]
        recipe = [
            SmoothQuantModifier(smoothing_strength=self.params.smoothing_strength, mappings=mappings),
            QuantizationModifier(config_groups={"group_0": scheme_of(form, scale_dtype=DTYPES[spec.dtype])}, ignore=list(ignore)),
        ]
        quantization = quantization_config(form, ignore)
        return calibrate(ctx, model, calibration, self.params.windows, self.params, self.execution, recipe, spec, quantization)


def smoothed(packed: ModelSpec) -> set[str]:
    """The Linear layers that smoothing changes."""
    return {name for pair in norm_smoothings(packed) for name in pair.balance}


def largest_weight(model: ModelSpec) -> int:
    return max(math.prod(group.shape) for group in model.linear_groups if group.layers) * ITEM_BYTES[model.dtype]
