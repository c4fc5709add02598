"""The settings of every stage that scores text with a whole model, or with one layer of it at a time. Needs no torch: a plan reads it."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from pipeline.stage import Stage
from pipeline.target import Size

Device = Literal["auto", "cpu", "cuda"]


class LayerwiseExecution(Stage.Execution):
    """How a model is held while it scores: whole, or one layer at a time."""

    mode: Literal["resident", "layerwise"] = "resident"  # layerwise: one layer in memory, for a model that does not fit
    batch_size: int = Field(default=8, ge=1)  # windows in one forward
    hidden_states: Size | None = Field(default=None, ge=1)  # layerwise: RAM for the text in flight; the default is 4GiB
    device: Device = "auto"

    @field_validator("hidden_states")
    @classmethod
    def _has_an_effect(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("mode") == "resident":
            raise ValueError("it has an effect only with mode: layerwise; leave it out or write mode: layerwise")
        return value
