"""What a machine allows at most, beside which a measured speed is held: its two peaks and the work of one model. Needs no torch.

    bounds(held, Peaks(bandwidth=20e9, flops=400e9), Load(batch=8, prompt_tokens=256, new_tokens=32)).decode    # tokens/s

`held` is the model as the engine has it in memory: transformers multiplies compressed-tensors' weights out, so that each token reads dense
ones, and computes with bitsandbytes' as they are stored.
"""

from typing import NamedTuple

from pipeline.roofline import Work, decode_work, seconds, table_size
from pipeline.spec import ModelSpec
from pipeline.target import Target
from stages.runtime.stage_work import forward_flops

COPY_BYTES = 256 << 20  # of each of two buffers: larger than the caches of all but a few processors
CPU_SIDE, GPU_SIDE = 1024, 8192  # of the square matrices that are multiplied: large enough for 0.9 of what larger ones reach


class Load(NamedTuple):
    """`batch` prompts of `prompt_tokens` at once, each continued by `new_tokens`, of which the prompt gives the first."""

    batch: int
    prompt_tokens: int
    new_tokens: int


class Peaks(NamedTuple):
    """What was measured of one device: bytes/s between it and its memory, and FLOP/s in the model's dtype."""

    bandwidth: float
    flops: float


class Bounds(NamedTuple):
    """Tokens/s of all sequences together, at most: of prompts that are read, and decoded."""

    prefill: float
    decode: float


def as_engine_holds(model: ModelSpec, engine: str) -> ModelSpec:
    """The model in memory: dense for transformers, but for bitsandbytes' formats; vllm keeps packed weights."""
    kept = any(group.format.by_bitsandbytes for group in model.groups)
    return model.dense() if engine == "transformers" and not kept else model


def peak_bytes(on_gpu: bool) -> int:
    """Memory that measuring the peaks takes: two buffers, and after them three matrices."""
    return max(2 * COPY_BYTES, 3 * 4 * (GPU_SIDE if on_gpu else CPU_SIDE) ** 2)


def prefill_work(held: ModelSpec, load: Load) -> Work:
    """Of all prompts at once: the last token of each alone meets the head, and weights are read once."""
    tokens = load.batch * load.prompt_tokens
    flops = forward_flops(held, tokens, load.prompt_tokens, head=False) + 2 * load.batch * table_size(held)
    return Work(flops=flops, nbytes=decode_work(held, context=0, batch=tokens).nbytes)


def step_work(held: ModelSpec, load: Load) -> Work:
    """Of one decode step, at the middle of the new tokens."""
    return decode_work(held, load.prompt_tokens + load.new_tokens // 2, load.batch)


def bounds(held: ModelSpec, peaks: Peaks, load: Load, devices: int = 1) -> Bounds:
    """Over `devices` of these peaks."""
    roof = Target(name="measured", bandwidth=peaks.bandwidth, flops=peaks.flops)
    prefill = seconds(prefill_work(held, load), roof, utilisation=1, devices=devices)
    step = seconds(step_work(held, load), roof, utilisation=1, devices=devices)
    assert prefill and step, "both peaks are known"
    return Bounds(load.batch * load.prompt_tokens / prefill, load.batch / step)
