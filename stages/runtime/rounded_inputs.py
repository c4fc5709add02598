"""Make a decoder's Linear layers round what they multiply, as the formats of their weights ask for, whoever multiplied out the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from pipeline.layout import WeightFormat
from stages.runtime.packing import rounded_inputs


def round_inputs(decoder: torch.nn.Module, formats: Mapping[str, WeightFormat]) -> None:
    """Change `decoder`, the model below its head, in place. `formats` are by full module name; those without such a demand are passed over.

    compressed-tensors' 8-bit formats round a layer's inputs before it computes with dense weights. An LLM.int8() layer takes the place
    of the dense one, and has the tensors of its file.
    """
    for name, form in formats.items():
        if not form.rounds_inputs or not name.startswith("model.layers."):
            continue
        inner = name.removeprefix("model.")
        module, inputs = decoder.get_submodule(inner), rounded_inputs(form)
        assert isinstance(module, torch.nn.Linear), f"{name} is no Linear layer"
        if inputs is None:
            decoder.set_submodule(inner, _int8_layer(module, form))
        else:
            module.register_forward_pre_hook(_rounding(inputs))


def _rounding(args: QuantizationArgs) -> Any:
    def round_them(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        value, *others = inputs
        scale, zero_point = compute_dynamic_scales_and_zp(value=value, args=args, module=module)
        return (fake_quantize(value, scale, zero_point, args), *others)

    return round_them


def _int8_layer(module: torch.nn.Linear, form: WeightFormat) -> torch.nn.Module:
    from stages.runtime.bitsandbytes_weights import LLMInt8Linear  # here: importing the library initialises CUDA

    assert form.threshold is not None, "an LLM.int8() format has a threshold"
    with torch.device("meta"):
        return LLMInt8Linear(module.out_features, module.in_features, module.bias is not None, form.threshold).eval()
