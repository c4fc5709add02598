"""How fast a checkpoint is on this machine, and what memory it takes. Quality is another stage's matter."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.artifact import Benchmark, Checkpoint, Export
from pipeline.compute_dtype import Computing
from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from pipeline.usage import peak_rss, peak_vram, resident
from stages.runtime.benchmark_report import Measured
from stages.runtime.peak_memory import peak, resident_memory, widest
from stages.runtime.speed_bounds import Load, as_engine_holds, bounds, peak_bytes, prefill_work, step_work
from stages.runtime.stage_work import reading

if TYPE_CHECKING:
    from stages.runtime.benchmarking import Engine


class BenchmarkStage(Stage):
    """Prompts read and tokens decoded each second, greedily, on this very machine: its fingerprint is in the key.

    Each of `batch_sizes` prompts of `prompt_tokens` random tokens is read at once (prefill, which gives the first new token), then
    the other `new_tokens - 1` are decoded, one forward each. One run warms up; figures are medians of `repeats` more, spreads are
    (largest - smallest) / median of their seconds. All of them are in `benchmark.json`.

    Metrics, with `b8` for batch size 8: `load_seconds` (files to memory, libraries imported before; the files may be in the page cache),
    `prefill_tokens_per_second_b8` and `decode_tokens_per_second_b8` (of all sequences together), `prefill_spread_b8`, `decode_spread_b8`,
    `peak_ram` (bytes above what was resident before loading) and on a GPU `peak_vram` (reserved), `threads` of the CPU.

    Beside them the roofline of this machine (pipeline/roofline.py) from two peaks that the stage measures at the end, on the same
    device: `bandwidth` (bytes/s read and written by a large copy) and `flops` (FLOP/s of a large square product in the model's dtype).
    `prefill_bound_tokens_per_second_b8` and `decode_bound_tokens_per_second_b8` are at most possible with weights and cache as the
    engine holds them. Where these fit into the processor's caches, which are faster than its memory, decoding can exceed it.

    engine transformers: a forward at a time, from Python; packed weights are multiplied out on loading, so that they take the memory and
    the time of dense ones; a checkpoint with a `kv_cache.json` keeps its INT8 cache. `weights_bytes` (of the loaded model) and
    `cache_bytes_b8` (at the longest) are measured. engine vllm: `vllm.LLM` in this process, with its own kernels for packed weights;
    seconds of decoding are those of the whole less those of prefill. It takes most of the VRAM in advance, whatever the model needs.
    engine llama.cpp: a GGUF export on the CPU, flash attention on, its INT8 cache as q8_0 where it has one. `weights_bytes` are those of
    the file, which is mapped. Its integer products can be faster than the FLOP/s that are measured, which are of the model's dtype.
    """

    name, version = "benchmark", 1
    libraries: tuple[str, ...] = ("torch", "transformers", "compressed-tensors")
    measures_machine = True

    class Params(Computing, Stage.Params):
        """All of it, the device too, changes what is measured."""

        engine: Literal["transformers", "vllm", "llama.cpp"] = "transformers"
        device: Literal["auto", "cpu", "cuda"] = "auto"
        batch_sizes: tuple[int, ...] = Field(default=(1, 8), min_length=1)
        prompt_tokens: int = Field(default=256, ge=1)
        new_tokens: int = Field(default=32, ge=2)
        repeats: int = Field(default=5, ge=2)
        tensor_parallel_size: int = Field(default=1, ge=1)  # GPUs over which vllm splits the model

        @field_validator("batch_sizes")
        @classmethod
        def _in_order(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
            if min(sizes) < 1 or len(set(sizes)) < len(sizes):
                raise ValueError("give different numbers from 1 on, such as [1, 8]")
            return tuple(sorted(sizes))

        @model_validator(mode="after")
        def _has_an_effect(self) -> "BenchmarkStage.Params":
            if self.engine != "vllm" and self.tensor_parallel_size > 1:
                raise ValueError(f"tensor_parallel_size: {self.engine} computes on one device here; leave it out or write engine: vllm")
            if self.engine == "llama.cpp" and self.compute_dtype != "auto":
                raise ValueError("compute_dtype: llama.cpp computes in dtypes of its own; leave it out")
            if self.engine == "llama.cpp" and self.device == "cuda":
                raise ValueError("device: llama.cpp computes on the CPU here; leave it out or write device: cpu")
            if self.engine == "vllm" and self.device == "cpu":
                raise ValueError("device: vllm is measured on GPUs; leave it out or write engine: transformers")
            return self

    params: Params

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        super().__init__(params, execution)
        if self.params.engine == "vllm":
            self.libraries = (*self.libraries, "vllm")
        if self.params.engine == "llama.cpp":
            self.libraries = ("torch", "llama-cpp-python")

    @property
    def computes(self) -> bool:
        return self.params.engine != "llama.cpp"

    def on_gpu(self, target: Target) -> bool:
        return target.cuda and self.params.device != "cpu" and self.params.engine != "llama.cpp"

    def infer(self, model: ModelSpec) -> None:
        p, shape, problems = self.params, model.architecture, []
        if model.is_gguf != (p.engine == "llama.cpp"):
            held, instead = (
                ("a GGUF file", "engine: llama.cpp") if model.is_gguf else ("no GGUF file", "another engine, or put gguf before it")
            )
            problems.append(f"engine: the model is {held}, and {p.engine} was asked for; write {instead}")
        if p.prompt_tokens + p.new_tokens > shape.max_position:
            problems.append(
                f"prompt_tokens: {p.prompt_tokens} and {p.new_tokens} new_tokens are more than the model's {shape.max_position} positions; "
                "write less of either"
            )
        if shape.num_heads % p.tensor_parallel_size:
            problems.append(
                f"tensor_parallel_size: {p.tensor_parallel_size} does not divide the {shape.num_heads} heads; write a number that does"
            )
        if p.engine == "vllm" and model.kv_cache.mode == "static":
            problems.append(
                "engine: vllm reads no calibrated INT8 scales; write engine: transformers, or give kv_cache mode: per_token_head"
            )
        if problems:
            raise InputProblems(problems)

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        """The largest batch, or the peaks of the machine, which are measured after the model is gone."""
        p, on_gpu, packed_bytes = self.params, self.on_gpu(target), model.nbytes
        model = self._computed(model)
        shape, item = model.architecture, ITEM_BYTES[model.dtype]
        held, load = as_engine_holds(model, p.engine), self.loads[-1]
        beside, loaded = resident_memory("model", model, on_gpu)
        if p.engine == "vllm" or not (model.is_dense or held.is_dense):
            beside, loaded = {}, {"model, packed as in its files": packed_bytes}
        tokens = load.batch * (load.prompt_tokens + load.new_tokens)
        running = {
            "KV cache": tokens * held.kv_cache.bytes_per_token,
            "keys and values of one layer, once more": 2 * tokens * shape.num_kv_heads * shape.head_dim * item,
            "activations of one layer": load.batch * load.prompt_tokens * widest(shape) * item,
            "logits": load.batch * shape.vocab_size * item,
        }
        measuring = {"two buffers to copy, or three matrices to multiply": peak_bytes(on_gpu)}
        if on_gpu:
            return Memory(ram=beside, vram=peak(loaded | running, measuring))
        return Memory(ram=peak(loaded | running, measuring))

    def work(self, model: ModelSpec) -> Work:
        held, work = as_engine_holds(self._computed(model), self.params.engine), reading(model)
        for load in self.loads:
            for part, count in ((prefill_work(held, load), 1), (step_work(held, load), load.new_tokens - 1)):
                times = count * (1 + self.params.repeats)
                work += Work(flops=times * part.flops) if not self.computes else self.params.products(times * part.flops)
                work += Work(nbytes=times * part.nbytes)
        return work

    def _computed(self, model: ModelSpec) -> ModelSpec:
        """In the dtype of the computation; llama.cpp has dtypes of its own, near those of the file."""
        return self.params.in_memory(model) if self.computes else model

    @property
    def loads(self) -> list[Load]:
        """The smallest batch first."""
        p = self.params
        return [Load(batch, p.prompt_tokens, p.new_tokens) for batch in p.batch_sizes]

    def explain(self, model: ModelSpec) -> list[str]:
        if self.params.engine != "transformers" or model.is_dense or not as_engine_holds(model, "transformers").is_dense:
            return []
        return ["transformers multiplies packed weights out: memory and speed are those of the dense model, not of packed kernels"]

    def run(self, ctx: Context, model: Checkpoint | Export) -> Benchmark:
        import torch

        from stages.runtime.benchmarking import measure, measure_peaks
        from stages.runtime.tensors import DTYPES

        spec, floor = self._computed(model.model_spec), resident()
        engine = self._engine(model)
        timings = []
        for load in self.loads:
            progress = partial(ctx.progress, f"batch {load.batch}")
            timings.append(measure(engine, spec.architecture.vocab_size, load, self.params.repeats, progress))
        weights, ram, vram = engine.weights_bytes(), None if floor is None else peak_rss() - floor, peak_vram()
        engine.close()
        held, peaks = as_engine_holds(spec, self.params.engine), measure_peaks(engine.device, DTYPES[spec.dtype])
        measured = Measured(
            engine=engine.label,
            device=engine.device.type,
            threads=torch.get_num_threads(),
            dtype=spec.dtype,
            kv_cache=held.kv_cache.mode,
            load_seconds=engine.load_seconds,
            weights_bytes=weights,
            peak_ram=ram,
            peak_vram=vram,
            peaks=peaks,
            timings=tuple(timings),
            bounds={load.batch: bounds(held, peaks, load, self.params.tensor_parallel_size) for load in self.loads},
        )
        measured.write(ctx.output)
        ctx.note(measured.sentence())
        return Benchmark(ctx.output, metrics=measured.metrics())

    def _engine(self, model: Checkpoint | Export) -> "Engine":
        from stages.runtime.benchmarking import TransformersEngine
        from stages.runtime.loading import COMPUTE_DTYPES
        from stages.runtime.vllm_engine import VLLMEngine

        p = self.params
        if isinstance(model, Export):
            from stages.runtime.llama_cpp_speed import LlamaCppEngine

            return LlamaCppEngine(model, p.prompt_tokens + p.new_tokens, max(p.batch_sizes))
        if p.engine == "transformers":
            return TransformersEngine(model.path, p.device, COMPUTE_DTYPES[p.computes_in])
        return VLLMEngine(model, p.computes_in, p.prompt_tokens + p.new_tokens, max(p.batch_sizes), p.tensor_parallel_size)
