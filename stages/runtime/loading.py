"""Load a whole checkpoint through transformers, and believe nothing that it only warns about."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from pipeline.artifact import Checkpoint


def resolve_device(device: str) -> torch.device:
    """`auto` is the accelerator where there is one. ValueError for an accelerator that is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    if device != "cpu" and (accelerator is None or accelerator.type != torch.device(device).type):
        raise ValueError(f"device: '{device}' is not on this machine; write device: auto or device: cpu")
    return torch.device(device)


def load_model(folder: Path, device: torch.device | str = "cpu") -> Any:
    """The folder's causal language model in its own dtype, in eval mode; packed weights are multiplied out once, on loading.

    ValueError names the weights that are missing, left over or of another shape: transformers fills those in at random.
    """
    packed = Checkpoint(folder).config.get("quantization_config") is not None
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=False, local_files_only=True, **options
    )
    check_loaded(folder, report)
    if packed:
        remove_dispatch(model)  # unpacking leaves weights in caches that `to` would copy into rather than move
    return model.to(device).eval()


def check_loaded(folder: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """`report` is the loading info of a `from_pretrained`. ValueError where it lists anything: transformers only warns of it."""
    problems = {what: sorted(map(str, found)) for what, found in report.items() if found}
    if problems:
        listed = "; ".join(f"{what.replace('_', ' ')}: {', '.join(found[:3])}" for what, found in problems.items())
        raise ValueError(f"{folder} does not load as the model its config.json describes ({listed})")
