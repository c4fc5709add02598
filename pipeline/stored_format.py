"""Which weights a checkpoint says it stores, and how: the `quantization_config` of a config.json, in the words of a spec.

Read are compressed-tensors' weight-only integers, its 8-bit integers and floats with inputs rounded token by token, and bitsandbytes'.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.layout import Layout, WeightFormat
from pipeline.model_config import BitsAndBytesConfig, ConfigGroup, QuantizationConfig, parse

WHERE = "config.json: quantization_config"
ROUNDED_INPUTS: dict[tuple[str, str], Layout] = {("int-quantized", "int"): "int-quantized", ("float-quantized", "float"): "float-quantized"}
LINEAR = ("Linear",)  # targets of a scheme that all such layers have
READ = "compressed-tensors (pack-quantized, int-quantized, float-quantized) and bitsandbytes"


def stored_formats(quantization: Mapping[str, Any]) -> tuple[tuple[tuple[tuple[str, ...], WeightFormat], ...], tuple[str, ...]]:
    """The formats of the Linear layers, each with the layers that have it (LINEAR: all), and which layers stay dense: exact names, or
    `re:` and a pattern matched from the start.

    ValueError for any other method or layout.
    """
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method == "compressed-tensors" and layout == "pack-quantized":
        given = parse(QuantizationConfig, quantization, f"{WHERE}.")
        named = [(tuple(group.targets), _packed(group)) for group in given.config_groups.values()]
        if len(named) > 1 and not any("Linear" in targets for targets, _ in named):
            return tuple(named), tuple(given.ignore or ())
    form, ignore = _one_format(quantization)
    return ((LINEAR, form),), ignore


def _one_format(quantization: Mapping[str, Any]) -> tuple[WeightFormat, tuple[str, ...]]:
    """Of all Linear layers."""
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method == "bitsandbytes":
        return _bitsandbytes(parse(BitsAndBytesConfig, quantization, f"{WHERE}."))
    if method != "compressed-tensors" or layout not in ("pack-quantized", "int-quantized", "float-quantized"):
        raise ValueError(f"the checkpoint is quantized as {method}/{layout}; only {READ} are read")
    given = parse(QuantizationConfig, quantization, f"{WHERE}.")
    groups = list(given.config_groups.values())
    if len(groups) != 1 or groups[0].targets != ["Linear"]:
        raise ValueError(
            "the checkpoint mixes quantization schemes; read are one scheme over all Linear layers, and several that are pack-quantized, "
            "each of which names its layers"
        )
    form = _packed(groups[0]) if layout == "pack-quantized" else _with_inputs(groups[0], str(layout))
    return form, tuple(given.ignore or ())


def _packed(group: ConfigGroup) -> WeightFormat:
    weights = group.weights
    if group.input_activations:
        raise ValueError("the checkpoint packs weights whose inputs are rounded too; only weight-only schemes are read as pack-quantized")
    if weights.type != "int" or weights.strategy not in ("group", "channel"):
        raise ValueError(f"the checkpoint's weights are {weights.type} by {weights.strategy}; only int by group or channel is read")
    if weights.strategy == "channel":
        return WeightFormat(num_bits=weights.num_bits, symmetric=weights.symmetric)
    if weights.group_size is None or weights.group_size < 1:
        raise ValueError(f"{WHERE}: group_size is {weights.group_size}; groups need at least one column")
    return WeightFormat(num_bits=weights.num_bits, group_size=weights.group_size, symmetric=weights.symmetric)


def _with_inputs(group: ConfigGroup, layout: str) -> WeightFormat:
    weights, inputs = group.weights, group.input_activations or {}
    kind = (layout, weights.type)
    by_row = weights.strategy == "channel" and weights.symmetric and weights.num_bits == 8
    by_token = {"type": weights.type, "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    if kind not in ROUNDED_INPUTS or not by_row or any(inputs.get(name) != value for name, value in by_token.items()):
        raise ValueError(
            f"the checkpoint is {layout} with weights of {weights.num_bits} bits by {weights.strategy} and inputs by "
            f"{inputs.get('strategy')}; only 8 bits, symmetric, by channel and dynamically by token are read"
        )
    return WeightFormat.of(ROUNDED_INPUTS[kind])


def _bitsandbytes(given: BitsAndBytesConfig) -> tuple[WeightFormat, tuple[str, ...]]:
    """transformers skips a layer that one of `llm_int8_skip_modules` begins as a pattern, or ends literally; by itself only the head."""
    skipped = given.llm_int8_skip_modules if given.llm_int8_skip_modules is not None else ["lm_head"]
    ignore = tuple(f"re:{pattern}" for key in skipped for pattern in (key, f".*{re.escape(key)}$"))
    if given.load_in_8bit:
        return WeightFormat.of("llm_int8", threshold=given.llm_int8_threshold), ignore
    if not given.load_in_4bit:
        raise ValueError(f"{WHERE}: bitsandbytes with neither load_in_4bit nor load_in_8bit; write one of them")
    if given.bnb_4bit_quant_storage != "uint8":
        raise ValueError(f"{WHERE}: bnb_4bit_quant_storage is {given.bnb_4bit_quant_storage}; only uint8 is read")
    return WeightFormat.of(given.bnb_4bit_quant_type, double_quant=given.bnb_4bit_use_double_quant), ignore
