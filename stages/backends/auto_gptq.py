"""GPTQ by auto-gptq 0.7.1, the library that made the format common. It asks for a GPU, although its arithmetic runs anywhere.

Without one, two of its names are set in this process; its files stay as they are:
    auto_gptq.modeling._base.CUDA_0   the device it moves each layer to, a constant: the CPU
    torch.cuda.synchronize            which it calls after each layer: does nothing
"""

from typing import Any

import auto_gptq.modeling._base as base
import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
from transformers import AutoModelForCausalLM

from pipeline.stage import Context
from stages.backends.calibration import follow_layers, own_losses, read_windows

SHIMMED = (
    "auto_gptq was made for a GPU and this machine has none: in its process, and not in its files, its constant CUDA_0 was set to the CPU "
    "and torch.cuda.synchronize to nothing"
)


def gptq(
    ctx: Context,
    source: str,
    output: str,
    windows: str,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    actorder: str | None,
    dampening_frac: float,
    batch_size: int,
) -> dict[str, Any]:
    """`actorder: static` is the library's `desc_act` with `static_groups`. Computes in float32."""
    notes = [] if torch.cuda.is_available() else [_without_gpu()]
    config = BaseQuantizeConfig(
        bits=num_bits,
        group_size=group_size,
        damp_percent=dampening_frac,
        desc_act=actorder is not None,
        static_groups=actorder is not None,
        sym=symmetric,
        model_file_base_name="model",  # what transformers looks for; the library's own name holds bits and group size
    )
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    follow_layers(ctx, model.model.layers)
    quantizer = GPTQ_CAUSAL_LM_MODEL_MAP[model.config.model_type](model, False, config)
    ids = [torch.tensor([window]) for window in read_windows(windows)]
    examples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in ids]
    quantizer.quantize(examples, batch_size=batch_size, cache_examples_on_gpu=False)
    quantizer.save_quantized(output, use_safetensors=True)
    return {"losses": own_losses(model, ids[0][0].tolist()), "notes": notes}


def _without_gpu() -> str:
    base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    return SHIMMED
