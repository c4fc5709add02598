"""Load a whole checkpoint through transformers, and believe nothing that it only warns about."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from pipeline.artifact import Checkpoint
from stages.runtime.tensors import TensorReader

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # as settings name them


def resolve_device(device: str) -> torch.device:
    """`auto` is the accelerator where there is one. ValueError for an accelerator that is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    if device != "cpu" and (accelerator is None or accelerator.type != torch.device(device).type):
        raise ValueError(f"device: '{device}' is not on this machine; write device: auto or device: cpu")
    return torch.device(device)


def load_model(folder: Path, device: torch.device | str = "cpu", as_stored: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The folder's causal language model in eval mode, computing in `dtype` (default: its own); packed weights are multiplied out in that
    dtype once, on loading.

    Where a format rounds what its weights are multiplied with, the model does so too: with compressed-tensors' 8-bit formats beside
    the multiplied out weights, with LLM.int8() in bitsandbytes' own layers, which keep int8 weights. `as_stored` keeps its 4-bit layers
    too, as plain transformers does: that saves memory, and rounds otherwise wherever its kernels do.

    ValueError names the weights that are missing, left over or of another shape: transformers fills those in at random.
    """
    quantization = Checkpoint(folder).config.get("quantization_config") or {}
    by_bitsandbytes, int8 = quantization.get("quant_method") == "bitsandbytes", bool(quantization.get("load_in_8bit"))
    options: dict[str, Any] = {"dtype": dtype if quantization and dtype else "auto"}
    if by_bitsandbytes:
        from stages.runtime.bitsandbytes_weights import (  # here: importing the library initialises CUDA
            set_compute_dtype,
            without_failing_kernel,
        )

        options["device_map"] = {"": device if int8 or as_stored else "cpu"}
    elif quantization:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    check_loaded(folder, report)
    if by_bitsandbytes:
        if as_stored and dtype:
            set_compute_dtype(model, dtype)
        return without_failing_kernel(model if int8 or as_stored else model.dequantize(model.dtype).to(device)).eval()
    if quantization:
        remove_dispatch(model)  # unpacking leaves weights in caches that `to` would copy into rather than move
    elif dtype and dtype != model.dtype:
        convert(model, folder, dtype)
    return model.to(device).eval()


def convert(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Weights of a dense model in `dtype`, one after the other, each read into memory of its own: the mapped files, of which transformers'
    weights are views, are never read. Not `model.to(dtype)`, which would also round what is in no file, such as inverse frequencies."""
    reader = TensorReader(folder)
    for name, parameter in model.named_parameters():
        parameter.data = reader.read(name).to(dtype)


def check_loaded(folder: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """`report` is the loading info of a `from_pretrained`. ValueError where it lists anything: transformers only warns of it."""
    problems = {what: sorted(map(str, found)) for what, found in report.items() if found}
    if problems:
        listed = "; ".join(f"{what.replace('_', ' ')}: {', '.join(found[:3])}" for what, found in problems.items())
        raise ValueError(f"{folder} does not load as the model its config.json describes ({listed})")
