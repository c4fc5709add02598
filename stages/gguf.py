"""Export to GGUF, the file that llama.cpp and what is built on it run."""

from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.artifact import GGUF_FILE, DenseCheckpoint, Export
from pipeline.companions import CACHE_FILE
from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES, read_json
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.gguf_mix import Format, fallbacks, gguf_spec, unquantized
from stages.runtime.gguf_names import ARCHITECTURES
from stages.runtime.gguf_tokenizer import tokenizer_kind
from stages.runtime.stage_work import digesting, reading

UNQUANTIZED = "unquantized.gguf"
ROPE_TYPES = ("default", "llama3", "linear")
# Weights that one core of an EPYC with AVX-512 quantizes in a second, measured on 31 million:
QUANTIZED = {"Q8_0": 190e6, "Q5_K_M": 19e6, "Q4_K_M": 15e6, "Q2_K": 22e6}
CACHE_BLOCK = 32  # values that share a scale in llama.cpp's INT8 cache


class GGUF(Stage):
    """Write a dense checkpoint as `model.gguf`, and quantize it by llama.cpp's own code.

    F16 rounds every matrix to 16 bits. The others are llama.cpp's mixes: Q8_0 (blocks of 32 with a scale each), and the K-quants
    (super-blocks of 256 values, https://github.com/ggml-org/llama.cpp/pull/1684), which store the tensors that matter most in more bits.
    They need no calibration text. What is quantized is the checkpoint in its own dtype, never a copy in fewer bits. Which tensor is
    stored as what, and so every byte, is known in advance (stages/runtime/gguf_mix.py); the file is held to it.

    Then llama.cpp opens the file and reads a text of hard places and every word of the vocabulary: other token ids than transformers'
    are an error. A checkpoint whose cache is INT8 becomes an export whose cache is llama.cpp's `q8_0`. `evaluate` runs what is made.

    F16 needs the package `gguf` alone (the reading is left out, and said, where llama-cpp-python is not installed); the others both.
    """

    name, version = "gguf", 1
    keeps_weights = True  # as kv_cache: a static cache is refused with a sentence of its own
    libraries: tuple[str, ...] = ("torch", "transformers", "gguf")

    class Params(Stage.Params):
        format: Format = "Q4_K_M"

    class Execution(Stage.Execution):
        threads: int | None = Field(default=None, ge=1)  # of the quantization; None: as torch has

    params: Params
    execution: Execution

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        super().__init__(params, execution)
        if self.params.format != "F16":
            self.libraries = (*self.libraries, "llama-cpp-python")

    def infer(self, model: ModelSpec) -> ModelSpec:
        shape, problems = model.architecture, []
        if shape.model_type not in ARCHITECTURES:
            problems.append(f"model: {shape.model_type} is not written to GGUF; there are: {', '.join(ARCHITECTURES)}")
        if shape.model_type == "qwen2" and shape.num_heads * shape.head_dim != shape.hidden_size:
            problems.append(
                f"model: llama.cpp takes the heads of qwen2 to be as wide as the model, and {shape.num_heads} of {shape.head_dim} are not "
                f"{shape.hidden_size}; prune other parts than heads"
            )
        if shape.rope_type not in ROPE_TYPES:
            problems.append(f"model: rope type {shape.rope_type} is not written to GGUF; there are: {', '.join(ROPE_TYPES)}")
        if model.kv_cache.mode == "static":
            problems.append("model: llama.cpp reads no calibrated INT8 scales; write mode: per_token_head in the stage kv_cache")
        elif model.kv_cache.mode and shape.head_dim % CACHE_BLOCK:
            problems.append(
                f"model: llama.cpp's INT8 cache takes heads of a multiple of {CACHE_BLOCK} and these have {shape.head_dim}; "
                "leave out the stage kv_cache"
            )
        if self.params.format == "F16" and self.execution.threads is not None:
            problems.append("execution.threads: F16 is not quantized, so it has no effect; leave it out or write another format")
        if problems:
            raise InputProblems(problems)
        return gguf_spec(model, self.params.format)

    def refusals(self, folder: Path) -> list[str]:
        config, problems = read_json(folder / "config.json"), []
        activation, rope = config.get("hidden_act", "silu"), config.get("rope_parameters") or {}
        if activation != "silu":
            problems.append(f"model: llama.cpp computes silu between the MLP's layers, and this model {activation}; it cannot be exported")
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            problems.append("model: llama.cpp rotates all of a head of this architecture, and this model a part; it cannot be exported")
        if (folder / "tokenizer.json").is_file():
            try:
                tokenizer_kind(read_json(folder / "tokenizer.json"))
            except ValueError as error:
                problems.append(f"model: {error}; it cannot be exported to GGUF")
        return problems

    def memory(self, model: ModelSpec, target: Target) -> Memory:
        """Pages of the file that llama.cpp maps are the system's to take back, and not counted."""
        made, between = gguf_spec(model, self.params.format), unquantized(model)
        largest = max(group.shape[0] * group.shape[-1] for group in model.groups)
        ram = {"the largest tensor, as read, reordered and as written": 3 * largest * ITEM_BYTES[model.dtype]}
        disk = {"export": made.nbytes}
        if self.params.format == "F16":
            return Memory(ram=ram, disk=disk)
        return Memory(ram=ram, disk=disk | {"the same, not quantized yet": between.nbytes})

    def work(self, model: ModelSpec) -> Work:
        made = gguf_spec(model, self.params.format)
        work = reading(model) + Work(disk=made.nbytes) + digesting(made.nbytes)
        if self.params.format == "F16":
            return work
        return work + Work(disk=2 * unquantized(model).nbytes, cpu_shared=model.num_parameters / QUANTIZED[self.params.format])

    def explain(self, model: ModelSpec) -> list[str]:
        said = fallbacks(model, self.params.format)
        if model.kv_cache.mode:
            before, after = model.kv_cache, gguf_spec(model, self.params.format).kv_cache
            said.append(
                f"KV cache: llama.cpp's INT8 has a scale for each {CACHE_BLOCK} values, "
                f"{before.bytes_per_token:,} -> {after.bytes_per_token:,} bytes per token"
            )
        return said

    def run(self, ctx: Context, model: DenseCheckpoint) -> Export:
        from stages.runtime.gguf_check import check_file, check_reading
        from stages.runtime.gguf_writer import context_length, write_gguf
        from stages.runtime.tensors import copy_companions

        source, form = model.model_spec, self.params.format
        spec, file, between = gguf_spec(source, form), ctx.output / GGUF_FILE, ctx.output / UNQUANTIZED
        copy_companions(model.path, ctx.output, model.config)
        (ctx.output / CACHE_FILE).unlink(missing_ok=True)  # another cache's layout
        if form == "F16":
            write_gguf(model, spec, file, lambda done, total: ctx.progress("writing", done, total))
        else:
            self._quantize(ctx, model, between, file)
        check_file(file, spec)
        ctx.note(check_reading(file, ctx.output))
        positions = context_length(source.architecture, model.config)
        if positions < source.architecture.max_position:
            ctx.note(f"the file says {positions} positions: up to there the model's sliding window and llama.cpp's attention are the same")
        return Export(path=ctx.output, spec=spec)

    def _quantize(self, ctx: Context, model: DenseCheckpoint, between: Path, file: Path) -> None:
        """Apart from `run`, because these imports bring llama.cpp, which F16 does without."""
        import torch

        from stages.runtime.gguf_writer import write_gguf
        from stages.runtime.llama_cpp_engine import quantize

        write_gguf(model, unquantized(model.model_spec), between, lambda done, total: ctx.progress("writing", done, total + 1))
        quantize(between, file, self.params.format, self.execution.threads or torch.get_num_threads())
        between.unlink()
