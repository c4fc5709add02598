"""What is read of a Hugging Face `config.json`: the fields that decide shapes, each with its type and its bounds.

A file from anywhere may hold anything. Numbers are strict (`"2"` is no head count) and bounded well above any real model, so that
a slip of the keyboard costs a sentence and not all of the memory. Fields that decide no shape are not looked at. Where a file is
silent, a default is the one that transformers has for that `model_type`; sizes that no reader could guess have none.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InputProblems

Model = TypeVar("Model", bound=BaseModel)

Width = Annotated[int, Field(ge=1, le=1 << 24)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]
Positions = Annotated[int, Field(ge=1, le=1 << 32)]
Layer = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    """Unlike the product's own values: other fields are passed over, since a config.json holds dozens of them."""

    model_config = ConfigDict(strict=True, frozen=True)


class ModelConfig(_Strict):
    """The fields of a config.json that decide shapes, with the defaults of `llama`."""

    model_type: str
    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: int = Field(ge=1, le=1000)
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None  # None: each query head has its own
    head_dim: Heads | None = None  # None: the hidden size is dealt out to the query heads
    max_position_embeddings: Positions = 2048
    dtype: str | None = None
    torch_dtype: str | None = None  # what `dtype` was called before transformers 5
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    quantization_config: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None  # what part of it was called before transformers 5

    @property
    def rope_type(self) -> str:
        """How rotary frequencies are scaled; `default`: not at all."""
        given = self.rope_parameters or self.rope_scaling or {}
        return str(given.get("rope_type") or given.get("type") or "default")

    @property
    def kv_heads(self) -> int:
        """ValueError where the query heads cannot share them."""
        heads = self.num_attention_heads
        shared = self.num_key_value_heads or heads
        if heads % shared:
            raise ValueError(f"config.json: {heads} query heads cannot share {shared} KV heads evenly")
        return shared

    @property
    def head_width(self) -> int:
        """ValueError where the hidden size is too small for its heads."""
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        if not width:
            raise ValueError(f"config.json: a hidden_size of {self.hidden_size} is not enough for {self.num_attention_heads} query heads")
        return width


class MistralConfig(ModelConfig):
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Positions = 131072


class Qwen2Config(ModelConfig):
    num_key_value_heads: Heads | None = 32
    max_position_embeddings: Positions = 32768


class Qwen3Config(Qwen2Config):
    head_dim: Heads | None = 128


class WithExperts(ModelConfig):
    """What every mixture of experts says. Qwen's published files write `num_experts`; transformers 5 saves `num_local_experts`."""

    num_local_experts: int = Field(ge=1, le=1024, validation_alias=AliasChoices("num_local_experts", "num_experts"))
    num_experts_per_tok: int = Field(ge=1, le=1024)

    @property
    def experts_per_token(self) -> int:
        """ValueError where a token would choose more experts than there are."""
        chosen, there = self.num_experts_per_tok, self.num_local_experts
        if chosen > there:
            raise ValueError(f"config.json: num_experts_per_tok is {chosen}, more than the {there} experts that there are")
        return chosen

    @property
    def expert_width(self) -> int:
        return self.intermediate_size

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that have one MLP for all tokens."""
        return ()


class MixtralConfig(MistralConfig, WithExperts):
    pass


class Qwen3MoeConfig(Qwen2Config, WithExperts):
    num_key_value_heads: Heads | None = 4
    moe_intermediate_size: Width
    decoder_sparse_step: int = Field(default=1, ge=1, le=1000)
    mlp_only_layers: list[Layer] | None = None

    @property
    def expert_width(self) -> int:
        return self.moe_intermediate_size

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Those listed, and all but every `decoder_sparse_step`-th. ValueError where one is not there, or none is left with experts."""
        listed, there = self.mlp_only_layers or [], self.num_hidden_layers
        beyond = [layer for layer in listed if layer >= there]
        if beyond:
            raise ValueError(f"config.json: mlp_only_layers names layer {beyond[0]}, and there are {there}, counted from 0")
        found = tuple(layer for layer in range(there) if layer in listed or (layer + 1) % self.decoder_sparse_step)
        if len(found) == there:
            raise ValueError(
                "config.json: decoder_sparse_step and mlp_only_layers leave no layer with experts; write model_type qwen3 then"
            )
        return found


CONFIGS: dict[str, type[ModelConfig]] = {
    "llama": ModelConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}


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


class BitsAndBytesConfig(_Strict):
    """`quantization_config` of a checkpoint that bitsandbytes quantized, with transformers' defaults."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: str = "uint8"
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    llm_int8_skip_modules: list[str] | None = None


class QuantizationConfig(_Strict):
    """`quantization_config` of a checkpoint in the compressed-tensors format."""

    config_groups: dict[str, ConfigGroup]
    ignore: list[str] | None = None


def parse(kind: type[Model], content: Mapping[str, Any], where: str) -> Model:
    """InputProblems names every field of `content` that is missing or makes no sense, led by `where`."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        raise InputProblems(_problem(dict(row), where) for row in error.errors(include_url=False)) from None


def _problem(row: Mapping[str, Any], where: str) -> str:
    """One row of pydantic's report as a sentence."""
    field = where + ".".join(map(str, row["loc"]))
    if row["type"] == "missing":
        return f"{field} is missing"
    message = "input should be an object" if row["type"] in ("model_type", "dict_type") else row["msg"]
    return f"{field} is {reprlib.repr(row['input'])}; {message[0].lower()}{message[1:]}"
