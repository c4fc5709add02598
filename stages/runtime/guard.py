"""What every checkpoint must prove before it is published. Most silent failures of the libraries below end here."""

import json
from pathlib import Path

import torch

from pipeline.companions import CACHE_FILE
from pipeline.hashed import known
from pipeline.headers import read_json
from pipeline.kv_sidecar import read_cache
from pipeline.layout import KVCacheSpec
from pipeline.spec import ModelSpec
from stages.runtime.cache_scales import scale_problems
from stages.runtime.inspection import inspect
from stages.runtime.layerwise import LayerwiseModel
from stages.runtime.loading import load_model
from stages.runtime.offloading import check_loads
from stages.runtime.scoring import token_losses
from stages.runtime.sparsity import Zeros
from stages.runtime.tensors import UNPLANNED, TensorReader
from stages.runtime.windows import chunk_tokens

PROBLEMS_SHOWN = 5

# Mean over tokens of |difference|, in nats. Reloaded weights are the same numbers and both models compute on the CPU, so the
# losses are the same floats; the margin is for kernels that are free to add in another order.
PROBE_TOLERANCE = 1e-3


def check_checkpoint(folder: Path, spec: ModelSpec) -> dict[str, float]:
    """Names, dtypes, shapes, config.json, KV cache and every value of a checkpoint. ValueError says how it departs from `spec`.

    Returns what was measured: of a model known to be sparse its `sparsity`, the share of zeros.
    """
    reader = TensorReader(folder)
    problems = spec.differences(reader.table) + cache_differences(folder, spec.kv_cache)
    if not problems:
        problems = config_differences(folder, spec) + [f"{name} holds nan or inf" for name in damaged_tensors(reader)]
        problems += wrong_weight_shapes(reader, spec)
    zeros = Zeros.counted(reader, spec) if spec.sparsity and not problems else None
    problems += zeros.problems if zeros else []
    if problems:
        more = f" and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise ValueError(f"{UNPLANNED}{'; '.join(problems[:PROBLEMS_SHOWN])}{more}")
    return {"sparsity": zeros.share} if zeros else {}


def config_differences(folder: Path, spec: ModelSpec) -> list[str]:
    """How the model that config.json describes departs from `spec`; the cache layout (`cache_differences`) and zeros are not its matter."""
    found = ModelSpec.from_config(read_json(folder / "config.json"))
    if found.model_copy(update={"kv_cache": spec.kv_cache, "sparsity": spec.sparsity}) == spec:
        return []
    mine, planned = found.architecture.model_dump(), spec.architecture.model_dump()
    fields = [f"config.json says {name} {mine[name]}, expected {planned[name]}" for name in planned if mine[name] != planned[name]]
    return fields or ["config.json's quantization_config describes other layers or another scheme than the files hold"]


def cache_differences(folder: Path, planned: KVCacheSpec) -> list[str]:
    """How `kv_cache.json` and the scales beside it depart from the cache of the spec; a 16-bit cache has no such files."""
    settings = read_cache(folder)
    mode = settings.mode if settings else None
    if mode != planned.mode:
        return [f"{CACHE_FILE} {f'says mode {mode}' if mode else 'is missing'}, expected {planned.mode or 'no INT8 cache'}"]
    return scale_problems(folder, planned)


def damaged_tensors(reader: TensorReader) -> list[str]:
    """Those that hold nan or inf, as was seen when their files were written or checked here. What others wrote is read once, which
    also gives its sha256."""
    files = {entry.file for entry in reader.table.values()}
    damaged = {name for file in files for name in (known(file) or inspect(file)).damaged}
    return [name for name in reader.table if name in damaged]


def wrong_weight_shapes(reader: TensorReader, spec: ModelSpec) -> list[str]:
    """`weight_shape` is read by every loader to unpack, as is bitsandbytes' JSON, and they are data that no header shows."""
    problems = []
    for group in spec.groups:
        stored = [suffix for suffix in group.format.tensors((1, 1), spec.dtype) if suffix == "weight_shape" or "quant_state" in suffix]
        for name in (f"{module}.{suffix}" for module in group.module_names for suffix in stored):
            content = reader.read(name).tolist()
            found = content if name.endswith(".weight_shape") else json.loads(bytes(content))["shape"]
            if found != list(group.shape):
                problems.append(f"{name} holds {found}, expected {list(group.shape)}")
    return problems


def layerwise_losses(folder: Path, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`token_losses` of the checkpoint `folder` without loading it whole, from products of the same shapes and so rounded alike."""
    model, targets = LayerwiseModel(folder, dtype), ids[:, 1:].flatten()
    (hidden,) = model.sweep([ids])
    chunks = torch.split(hidden[:, :-1].flatten(0, 1), chunk_tokens(model.spec.architecture.vocab_size))
    log_sum, chosen = torch.full(targets.shape, -torch.inf), torch.zeros(targets.shape)
    for first, slices in model.logit_slices(chunks):
        logits = torch.cat(list(slices))
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
        here = (targets >= first) & (targets < first + logits.shape[1])
        chosen[here] = logits[here, targets[here] - first]
    return log_sum - chosen


def check_probe(expected: torch.Tensor, folder: Path, ids: torch.Tensor, dtype: torch.dtype | None = None, layerwise: bool = False) -> None:
    """Load the checkpoint as anyone would and compare its `token_losses` on `ids`, [windows, length], with those of the model
    that was made, on the CPU, before it was saved; both compute in `dtype` (default: its own).

    Token by token, because errors of both signs leave a mean where it was.

    `layerwise` is for a model larger than memory: transformers only looks for its weights, and it is run one layer at a time.
    ValueError where they differ: what was saved is not what was made.
    """
    if layerwise:
        check_loads(folder)
    losses = layerwise_losses(folder, ids, dtype) if layerwise else token_losses(load_model(folder, dtype=dtype), ids)
    difference = (losses - expected).abs().mean().item()
    if not difference <= PROBE_TOLERANCE:  # also when it is nan
        raise ValueError(
            f"the saved checkpoint does not reload as the model that was made: its losses on a probe differ by {difference:.3g} nats "
            f"per token, rounding explains {PROBE_TOLERANCE}; report this with the versions of torch and compressed-tensors"
        )
