"""LoRA on a base that is frozen in NF4, and its way back into the weights it was trained beside.

An adapter is merged into the original weights and never into the NF4 ones: W + (lora_alpha / rank) * B A, tensor by tensor, in
float32, rounded once to W's own dtype. So the merged checkpoint carries no rounding error of NF4; the adapter has learned to
correct that error too, which costs a little and is what the QLoRA authors do. Adapters are saved as ordinary peft folders.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.headers import CheckpointFileError, read_header, read_json
from stages.runtime.loading import check_loaded
from stages.runtime.lora_settings import LORA_TARGETS
from stages.runtime.tensors import CheckpointWriter, TensorReader, copy_companions

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names
PREFIX = "base_model.model."  # what peft puts before the base model's module names
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")  # settings of adapters whose product is another
BLOCK_WEIGHTS = 1 << 20  # weights merged at once: the float32 copy of a block is the only memory beyond one tensor


def load_nf4(folder: Path, device: torch.device | str, compute_dtype: torch.dtype, double_quant: bool = True) -> Any:
    """The folder's causal language model with its decoder Linear weights in NF4 and all else in `compute_dtype`, in eval mode.

    Weights are quantized one by one as they are read. Embeddings and lm_head stay unquantized. ValueError as `load_model`.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["lm_head"],  # the option's name is older than 4 bits; it holds for both
    )
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=settings,
        dtype=compute_dtype,
        device_map={"": device},
        output_loading_info=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    check_loaded(folder, report)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first forward in eval mode would repack the weight in place for an inference kernel without
            # a backward; every gradient below that layer and every reader of the weight would then be wrong, without an error.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit) and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()  # what is not quantized is a view of the mapped file, and keeps all of it in memory
    return model.eval()


def add_lora(model: Any, rank: int, lora_alpha: float, lora_dropout: float, seed: int) -> Any:
    """`model` as a peft model: an adapter beside every decoder Linear layer, in float32, and nothing else trainable.

    B starts at zero, so the model computes what it did; A is drawn from `seed`, whatever torch's global generator holds.
    """
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(LORA_TARGETS),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, settings)


def save_adapter(model: PeftModel, folder: Path, base_name: str | None = None) -> None:
    """Write a peft folder that stock `PeftModel.from_pretrained(base, folder)` loads onto the base it was trained beside.

    `base_name` stands in it as the base's name. None, and not the path that the base was loaded from, unless a name is known that
    means the same elsewhere: the store may drop that path, and peft would look for it on the hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)  # "auto" would ask the hub for the base's config
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = replace(model.peft_config["default"], base_model_name_or_path=base_name, inference_mode=True)
    settings.save_pretrained(folder)  # of the settings alone: the model's own would name the base's path


class AdapterReader(TensorReader):
    """The tensors of a peft folder, and the LoRA pairs among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = read_header(folder / ADAPTER_WEIGHTS)
        settings = read_json(folder / ADAPTER_CONFIG)
        if settings.get("peft_type") != "LORA" or any(settings.get(kind) for kind in OTHER_KINDS):
            raise CheckpointFileError(f"{folder} is no plain LoRA adapter; merge it with peft")
        self.scaling = settings["lora_alpha"] / settings["r"]

    def pair(self, weight: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(A [rank, in], B [out, rank]) in float32 of the weight of that name; None where it has no adapter."""
        module = PREFIX + weight.removesuffix(".weight")
        names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if names[0] not in self.table:
            return None
        return self.read(names[0]).float(), self.read(names[1]).float()


def merge_adapter(
    source: Path,
    adapter: Path,
    output: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    sparse: Collection[str] = (),
) -> float:
    """Write into `output` the dense checkpoint `source` with the adapter added to its weights, each in its own dtype.

    Zeros of the weights named in `sparse` stay zero. Returns the share of the adapter's products, of their squares, that fell on these.
    Holds one weight, its pair and a block of float32 rows. `progress` is told (tensors written, tensors). ValueError where the adapter
    does not belong to that checkpoint.
    """
    reader, pairs = TensorReader(source), AdapterReader(adapter)
    merged, added, lost = 0, 0.0, 0.0
    with CheckpointWriter(output, {name: (entry.dtype, entry.shape) for name, entry in reader.table.items()}) as writer:
        for done, name in enumerate(reader.table, 1):
            pair = pairs.pair(name)
            if pair is None:
                writer.copy(name, reader)
            else:
                weight = reader.read(name)
                if name in sparse:
                    kept, masked = add_masked_product(weight, *pair, pairs.scaling)
                    added, lost = added + kept + masked, lost + masked
                else:
                    add_product(weight, *pair, pairs.scaling)
                writer.add(name, weight)
                merged += 1
            progress(done, len(reader.table))
        if 2 * merged != len(pairs.table):
            raise ValueError(f"{adapter} has {len(pairs.table)} tensors, of which {2 * merged} fit {source}; it was made for another model")
    copy_companions(source, output, read_json(source / "config.json"))
    return lost / added if added else 0.0


def add_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """weight [out, in] += scaling * b [out, rank] @ a [rank, in], in place, in float32 by blocks of rows, rounded once."""
    for rows in _fitting_rows(weight, a, b):
        block = weight[rows]
        block.copy_(block.float().addmm_(b[rows], a, alpha=scaling))


def add_masked_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[float, float]:
    """As `add_product`, but zeros of `weight` stay zero. Returns the sum of squares of what was added, and of what was not."""
    added = lost = 0.0
    for rows in _fitting_rows(weight, a, b):
        block, product = weight[rows], scaling * (b[rows] @ a)
        whole = product.square().sum().item()
        product.masked_fill_(block == 0, 0)
        kept = product.square().sum().item()
        added, lost = added + kept, lost + whole - kept
        block.copy_(product.add_(block))
    return added, lost


def _fitting_rows(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    """Blocks of rows. ValueError where the product has another shape."""
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise ValueError(f"an adapter for a weight {[b.shape[0], a.shape[1]]} does not fit one of {list(weight.shape)}")
    height = max(1, BLOCK_WEIGHTS // weight.shape[1])
    for first in range(0, weight.shape[0], height):
        yield slice(first, first + height)
