"""The model that llm-compressor calibrates, in RAM or on disk.

On disk, compressed-tensors' offloading reads a weight when a module computes with it and writes it when a modifier changes it. Its
folder starts as links to the checkpoint's own files, so that nothing is copied; a tensor that is changed, such as a weight
rounded by GPTQ, replaces its link by a file of its own.

Either way llm-compressor moves one layer at a time to the accelerator, where there is one: nothing here moves the whole model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, from_accelerate, remove_dispatch
from compressed_tensors.offload.cache import disk
from compressed_tensors.utils import patch_attr
from safetensors import safe_open
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.integrations import accelerate

from stages.runtime.loading import check_loaded, convert, load_model


def open_unmapped(file: str, framework: str, device: str = "cpu", backend: str = "mmap") -> Any:
    """`safe_open` that reads a tensor when it is asked for, where its default maps the whole file and keeps the map."""
    return safe_open(file, framework=framework, device=device, backend="pread" if device == "cpu" else backend)


@contextmanager
def files_unmapped() -> Iterator[None]:
    """Within it transformers and compressed-tensors map no checkpoint file.

    safetensors maps files privately and writable, so that the system and `memory_limit` count all of their bytes as memory of this
    process: on loading those of the whole model, and then those of a file for each tensor of a layer.
    """
    with ExitStack() as patches:
        for module in (modeling_utils, accelerate, disk):
            patches.enter_context(patch_attr(module, "safe_open", open_unmapped))
        yield


@contextmanager
def model_in_ram(folder: Path, dtype: torch.dtype) -> Iterator[Any]:
    """The checkpoint `folder` as a causal language model that computes in `dtype`, in eval mode, on the CPU. Errors as of `load_model`.

    Its weights are read into memory of their own. transformers' are views of mapped files: of those, every page that was ever
    changed stays in memory with the map, also where AWQ has since replaced the tensor, and that came to the model a second time.
    """
    model = load_model(folder)
    convert(model, folder, dtype)
    yield model
    remove_dispatch(model)
    model.to("meta")  # frees its memory; `del` would not: torch.fx's tracer keeps a reference


@contextmanager
def model_on_disk(folder: Path, beside: Path, dtype: torch.dtype) -> Iterator[Any]:
    """The same with no weight in memory. `model.get_parameter(name)` reads one.

    Changed weights live in a temporary folder within `beside` that goes when the context is left.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="offload-", dir=beside) as changed, files_unmapped():
        model = load_on_disk(folder, changed, dtype)
        from_accelerate(model)
        yield model


def check_loads(folder: Path) -> None:
    """Let transformers find every weight of the model that config.json describes, one by one. ValueError as of `load_model`.

    It takes what stays on disk for missing, and would draw it at random, which fails for weights that are integers.
    """
    drawn = patch_attr(modeling_utils.PreTrainedModel, "initialize_weights", lambda model: None)
    with TemporaryDirectory() as unused, files_unmapped(), drawn:
        load_on_disk(folder, unused)


def load_on_disk(folder: Path, offload_folder: str, dtype: torch.dtype | None = None) -> Any:
    """transformers reads each tensor once, to let go of it at once; packed weights stay packed. `dtype` (default: the model's own) is what
    a weight gets when it is read to compute with."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype or "auto",
        device_map={"": "disk"},
        offload_folder=offload_folder,
        offload_buffers=True,  # the only kind that compressed-tensors takes over
        output_loading_info=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    check_loaded(folder, report)
    return model.eval()


@contextmanager
def layers_keep_weights(model: Any) -> Iterator[None]:
    """While it computes, a decoder layer or the output embedding keeps the weights that it has read.

    Without that the library computes with unrounded weights where they are on disk: for a forward it replaces `weight.data` by the
    rounded values, and the forward reads `weight` once more. (Its own calibration keeps them too.)
    """
    with ExitStack() as hooks, ExitStack() as kept:
        for module in (*model.get_decoder().layers, model.get_output_embeddings()):
            hooks.callback(module.register_forward_pre_hook(lambda *_: kept.enter_context(disable_offloading())).remove)
            hooks.callback(module.register_forward_hook(lambda *_: kept.close()).remove)
        yield
