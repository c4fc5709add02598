"""What is read of a Hugging Face `config.json`: the fields that decide shapes, each with its type and its bounds.

A file from anywhere may hold anything. Numbers are strict (`"2"` is no head count) and bounded well above any real model, so that
a slip of the keyboard costs a sentence and not all of the memory. Fields that decide no shape are not looked at.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Model = TypeVar("Model", bound=BaseModel)

Width = Annotated[int, Field(ge=1, le=1 << 24)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]


class _Strict(BaseModel):
    """Unlike the product's own values: other fields are passed over, since a config.json holds dozens of them."""

    model_config = ConfigDict(strict=True, frozen=True)


class ModelConfig(_Strict):
    """The fields of a config.json that decide shapes. None is transformers' default for the `model_type`."""

    model_type: str
    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: int = Field(ge=1, le=1000)
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    max_position_embeddings: int | None = Field(default=None, ge=1, le=1 << 32)
    dtype: str | None = None
    torch_dtype: str | None = None  # what `dtype` was called before transformers 5
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    quantization_config: dict[str, Any] | None = None


class WeightArguments(_Strict):
    """compressed-tensors' QuantizationArgs."""

    num_bits: int = Field(ge=1, le=8)  # what the format packs
    type: str
    strategy: str | None = None
    group_size: int | None = None
    symmetric: bool


class ConfigGroup(_Strict):
    targets: list[str]
    weights: WeightArguments
    input_activations: dict[str, Any] | None = None


class QuantizationConfig(_Strict):
    """`quantization_config` of a checkpoint in the compressed-tensors format."""

    config_groups: dict[str, ConfigGroup]
    ignore: list[str] | None = None


def parse(kind: type[Model], content: Mapping[str, Any], where: str) -> Model:
    """ValueError names the first field of `content` that is missing or makes no sense, led by `where`."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
    field = where + ".".join(map(str, row["loc"]))
    if row["type"] == "missing":
        raise ValueError(f"{field} is missing")
    message = "input should be an object" if row["type"] in ("model_type", "dict_type") else row["msg"]
    raise ValueError(f"{field} is {reprlib.repr(row['input'])}; {message[0].lower()}{message[1:]}")
