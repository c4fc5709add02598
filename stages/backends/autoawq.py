"""AWQ by autoawq 0.2.9, whose files most AWQ models on the hub are. Its authors have retired it, in favour of llm-compressor.

It drops samples that are longer than its limit without a word; here every window is as long as the limit. Without a GPU it spoils the
weights that it means to restore after each trial: what it keeps of them is `tensor.cpu()`, which on a CPU is the very tensor that it
then scales in place. `CopyingQuantizer` keeps copies.
"""

from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer

from pipeline.stage import Context
from stages.backends.calibration import follow_layers, own_losses, read_windows

COPIED = (
    "autoawq was made for a GPU and this machine has none: in its process, and not in its files, the weights that it restores after each "
    "trial of a scale were copied, which it counts on the move from a GPU to do"
)


class CopyingQuantizer(AwqQuantizer):  # type: ignore[misc]  # the library has no types
    """AwqQuantizer whose search restores the weights that were there before."""

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *others: Any, **options: Any
    ) -> torch.Tensor:
        state = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in state().items()}  # type: ignore[assignment]
        try:
            best: torch.Tensor = super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *others, **options)
        finally:
            del module2inspect.state_dict
        return best


def awq(
    ctx: Context,
    source: str,
    output: str,
    windows: str,
    num_bits: int,
    group_size: int,
    symmetric: bool,
    duo_scaling: bool,
    batch_size: int,
) -> dict[str, Any]:
    """Searches scales, then clipping thresholds; in float32, but weights are rounded in float16, as the library has it."""
    ids = read_windows(windows)
    quantizer = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32, device_map="cpu", use_cache=False)
    follow_layers(ctx, quantizer.model.model.layers)
    quantizer.quantize(
        None,
        quant_config={"zero_point": not symmetric, "q_group_size": group_size, "w_bit": num_bits, "version": "GEMM"},
        calib_data=ids,
        duo_scaling=duo_scaling,
        n_parallel_calib_samples=batch_size,
        max_calib_samples=len(ids),
        max_calib_seq_len=len(ids[0]),
        quantizer_cls=AwqQuantizer if torch.cuda.is_available() else CopyingQuantizer,
    )
    quantizer.save_quantized(output)
    return {"losses": own_losses(quantizer.model, ids[0]), "notes": [] if torch.cuda.is_available() else [COPIED]}
