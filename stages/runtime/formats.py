"""What quantizers to a format share that leaves nothing to choose but where it applies. Needs no torch: a plan reads it."""

from abc import ABC, abstractmethod

from pipeline.layout import WeightFormat
from pipeline.roofline import Work
from pipeline.spec import ModelSpec, ignored
from pipeline.stage import Stage
from stages.runtime.scheme import Ignore, names_left_dense, pack_layers
from stages.runtime.stage_work import packing, publishing, reading


class FormatQuantization(Stage.Params, ABC):
    """`stored` is the format of every Linear layer that `ignore` does not name."""

    ignore: Ignore = ("lm_head",)

    @property
    @abstractmethod
    def stored(self) -> WeightFormat: ...

    def apply(self, model: ModelSpec) -> ModelSpec:
        """The quantized model's spec. ValueError as of `pack_layers`, for a mixture of experts, and for a head that cannot be stored so."""
        form, shape = self.stored, model.architecture
        if shape.experts and (form.rounds_inputs or form.by_bitsandbytes):
            raise ValueError(
                f"{shape.model_type} has experts, which transformers holds in one tensor for each layer: it would compute them without "
                f"{form.layout}; use rtn, gptq or awq"
            )
        if form.rounds_inputs and not shape.tied and not ignored("lm_head", self.ignore):
            raise ValueError(
                f"ignore: as {form.layout} lm_head would round the hidden states that it reads; write lm_head into it, as by default"
            )
        return pack_layers(model, form, self.ignore)

    def ignored_names(self, model: ModelSpec) -> tuple[str, ...]:
        return names_left_dense(self.ignore, model)


def rounding_work(dense: ModelSpec, packed: ModelSpec) -> Work:
    """Of a stage that reads, rounds and writes one weight after another."""
    return reading(dense) + packing(packed) + publishing(packed)
