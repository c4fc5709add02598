"""Speed of a model, measured: an engine that reads prompts and decodes, repeated runs of it, and the peaks of the machine below it."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from pipeline.artifact import Checkpoint
from stages.runtime.benchmark_report import Timing
from stages.runtime.int8_cache import Int8Cache, load_cache
from stages.runtime.loading import load_model, resolve_device
from stages.runtime.speed_bounds import COPY_BYTES, CPU_SIDE, GPU_SIDE, Load, Peaks

PEAK_REPEATS = 5  # the fastest counts: other work on the machine can only slow one down


class Engine(Protocol):
    """A loaded model that can be timed. `label` says how it computes, for people."""

    label: str
    device: torch.device
    load_seconds: float

    def run(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds to read `prompt` [rows, length] up to the first new token, and to decode the others of `new_tokens`."""
        ...

    def weights_bytes(self) -> int | None:
        """Of the model in memory; None where the engine does not say."""
        ...

    def cache_bytes(self) -> int | None:
        """Of the KV cache as the last run left it; None where the engine does not say."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


LABELS = {
    None: "transformers",
    "compressed-tensors": "transformers, decompressed to dense",
    "bitsandbytes": "transformers with bitsandbytes",
}


class TransformersEngine:
    """A forward at a time, from Python, with the checkpoint's own INT8 cache where it has one."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        """ValueError as of `resolve_device` and `load_model`."""
        self.device = resolve_device(device)
        method = (Checkpoint(folder).config.get("quantization_config") or {}).get("quant_method")
        self.label = LABELS[method]
        started = time.perf_counter()
        self.model: Any = load_model(folder, self.device, as_stored=True, dtype=dtype)
        synchronize(self.device)
        self.load_seconds = time.perf_counter() - started
        self.int8 = load_cache(folder, self.model.config)
        self.cache: Any = None  # of the last run

    @torch.inference_mode()
    def run(self, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        """Greedy. Of the prompt's logits only the last token's are computed, as engines do."""
        prompt = prompt.to(self.device)
        self.cache = self._empty_cache()
        state = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        synchronize(self.device)
        started = time.perf_counter()
        token = self.model(prompt, **state).logits.argmax(-1)
        synchronize(self.device)
        read = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = self.model(token, **state).logits.argmax(-1)
        synchronize(self.device)
        return read - started, time.perf_counter() - read

    def _empty_cache(self) -> Any:
        if self.int8 is None:
            return DynamicCache(config=self.model.config)
        self.int8.reset()
        return self.int8

    def weights_bytes(self) -> int:
        """What stays attached to unpacked weights, such as their scales, included."""
        tensors: list[torch.Tensor] = list(self.model.parameters())
        states = [getattr(tensor, "quant_state", None) for tensor in tensors]  # of bitsandbytes' 4-bit weights
        return sum(tensor.nbytes for tensor in (*tensors, *(state.absmax for state in states if state is not None)))

    def cache_bytes(self) -> int:
        if isinstance(self.cache, Int8Cache):
            return self.cache.nbytes
        return sum(states.untyped_storage().nbytes() for layer in self.cache.layers for states in (layer.keys, layer.values))

    def close(self) -> None:
        self.model = self.cache = self.int8 = None
        release(self.device)


def measure(engine: Engine, vocab_size: int, load: Load, repeats: int, progress: Callable[[int, int], None]) -> Timing:
    """Time random prompts, always the same ones; a first run warms up."""
    prompt = torch.randint(vocab_size, (load.batch, load.prompt_tokens), generator=torch.Generator().manual_seed(0))
    engine.run(prompt, load.new_tokens)
    runs = []
    for done in range(1, repeats + 1):
        runs.append(engine.run(prompt, load.new_tokens))
        progress(done, repeats)
    prefill, decode = zip(*runs, strict=True)
    return Timing(load, prefill, decode, engine.cache_bytes())


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Bytes/s of a large copy, read and written (as STREAM counts), and FLOP/s of a large square product in `dtype`."""
    copied = copy_seconds(device)
    release(device)
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    left, right, product = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    multiplied = fastest(lambda: torch.mm(left, right, out=product), device)
    return Peaks(2 * COPY_BYTES / copied, 2 * side**3 / multiplied)


def copy_seconds(device: torch.device) -> float:
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return fastest(lambda: target.copy_(source), device)


def fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    taken = []
    for _ in range(1 + PEAK_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what was given to an accelerator; a CPU has no queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
