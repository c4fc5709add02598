"""Other libraries that a quantizer can hand its work to, each in an environment of its own (pipeline/envs.py).

They take the same model and text and give the same kind of checkpoint. What a library cannot do is refused, not ignored: each names the
parameters that it honours, and every other one has to be at its default. Facts are of autoawq 0.2.9, auto-gptq 0.7.1 and gptqmodel 7.6.0,
read in their code and tried. Needs no torch: a plan reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from pipeline.target import Memory
from stages.runtime.peak_memory import layer_bytes, peak, resident_memory
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, batch_memory, packing_memory

OWN = "llmcompressor"  # in llmpress's own environment
COMMON = frozenset({"backend", "num_bits", "group_size", "symmetric", "ignore", "num_samples", "max_length"})
CLIP_TOKENS = 512  # about as many tokens try each clipping threshold ...
CLIP_ROWS = 256  # ... of so many rows at once, every product of a weight and an input in memory


@dataclass(frozen=True)
class Backend:
    """One library as one quantizer uses it. `function` runs in environment `env` (stages/backends)."""

    name: str
    env: str
    function: str
    honours: frozenset[str]
    families: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")  # model types whose layers it knows and that were tried
    bits: tuple[int, ...] = (4,)
    symmetric: tuple[bool, ...] = (True, False)
    multiple: int = 32  # of rows: what it packs, or clips, at once; of columns 32
    in_float32: bool = False  # it computes so, whatever the model's dtype
    clips: bool = False  # it searches clipping thresholds too
    late: int = 90_000_000  # bytes of libraries and kernels that it loads while it works, measured


GPTQ_HONOURED = COMMON | {"actorder", "dampening_frac"}
GPTQ_BACKENDS: Mapping[str, Backend] = {
    "gptqmodel": Backend("gptqmodel", "gptqmodel", "stages.backends.gptqmodel:gptq", GPTQ_HONOURED, bits=(2, 4, 8)),
    "auto_gptq": Backend(
        "auto_gptq",
        "legacy",
        "stages.backends.auto_gptq:gptq",
        GPTQ_HONOURED,
        ("llama", "mistral", "qwen2"),
        (2, 4, 8),
        in_float32=True,
        late=30_000_000,
    ),
}
AWQ_BACKENDS: Mapping[str, Backend] = {
    "autoawq": Backend(
        "autoawq",
        "legacy",
        "stages.backends.autoawq:awq",
        COMMON | {"duo_scaling"},
        symmetric=(False,),
        multiple=64,
        in_float32=True,
        clips=True,
    ),
    "gptqmodel": Backend("gptqmodel", "gptqmodel", "stages.backends.gptqmodel:awq", COMMON, symmetric=(False,), multiple=64, clips=True),
}


def check_backend(backend: Backend | None, params: CalibratedQuantization, execution: CalibrationExecution, model: ModelSpec) -> None:
    """InputProblems with everything that the library cannot do. None: llm-compressor, which can do it all."""
    if backend is None:
        return
    name, kind = backend.name, model.architecture.model_type
    problems = _unhonoured(backend, params)
    if kind not in backend.families:
        problems.append(f"backend: {name} is not tried with models of type {kind}; write backend: {OWN}")
    if params.num_bits not in backend.bits:
        problems.append(
            f"num_bits: of {name} {' or '.join(map(str, backend.bits))} bits are read, not {params.num_bits}; write num_bits: 4, "
            f"or backend: {OWN}"
        )
    if params.symmetric not in backend.symmetric:
        instead = str(not params.symmetric).lower()
        problems.append(f"symmetric: {name} knows only symmetric: {instead}; write that, or backend: {OWN}")
    if getattr(execution, "offload", "ram") == "disk":
        problems.append(f"execution.offload: {name} keeps the whole model in RAM; write offload: ram, or backend: {OWN}")
    problems += _layers(backend, params, model)
    if problems:
        raise InputProblems(problems)


def _unhonoured(backend: Backend, params: CalibratedQuantization) -> list[str]:
    fields, problems = type(params).model_fields, []
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        if name not in backend.honours and getattr(params, name) != default:
            problems.append(f"{name}: {backend.name} cannot be told; leave it at {default}, or write backend: {OWN}")
    dampening = getattr(params, "dampening_frac", None)
    if "dampening_frac" in backend.honours and dampening is not None and not 0 < dampening < 1:
        problems.append(f"dampening_frac: {backend.name} takes more than 0 and less than 1, not {dampening:g}; write 0.01")
    return problems


def _layers(backend: Backend, params: CalibratedQuantization, model: ModelSpec) -> list[str]:
    """Every Linear layer of the decoder has to be rounded, and to fill whole words."""
    problems, packed = [], params.apply(model)
    if any(group.format.is_dense == bool(group.layers) for group in packed.linear_groups):
        problems.append(f"ignore: {backend.name} rounds all Linear layers but lm_head; write ignore: [lm_head], or backend: {OWN}")
    steps = (backend.multiple, 32)
    shapes = {group.pattern: group.shape for group in packed.linear_groups if group.layers}
    uneven = [name for name, shape in shapes.items() if any(size % step for size, step in zip(shape, steps, strict=True))]
    if uneven:
        problems.append(
            f"backend: {backend.name} takes {steps[0]} rows and {steps[1]} columns at a time, of which {', '.join(uneven)} is no multiple; "
            f"write backend: {OWN}"
        )
    return problems


def backend_sentences(backend: Backend | None) -> list[str]:
    """What differs from llm-compressor, for the plan."""
    if backend is None or not backend.clips:
        return []
    return [f"{backend.name} also searches thresholds to clip weights at, which llm-compressor's AWQ does not"]


def backend_memory(
    backend: Backend,
    params: CalibratedQuantization,
    execution: CalibrationExecution,
    model: ModelSpec,
    working: dict[str, int],
    on_gpu: bool,
) -> Memory:
    """While the library calibrates; while it holds both forms of the model; or while the result is repacked or loaded.

    `working` is what the stage's own arithmetic takes of one decoder layer, in RAM or on the GPU.
    """
    packed, shape = params.apply(model), model.architecture
    item = 4 if backend.in_float32 else ITEM_BYTES[model.dtype]
    dense = {"model, as the backend loads it": model.num_parameters * item, "what it loads late": backend.late}
    states = {"calibration hidden states": 2 * params.tokens * shape.hidden_size * item}
    batch = {"activations of one batch": batch_memory(params, model, execution.batch_size) * item // ITEM_BYTES[model.dtype]}
    layer = working | batch | _clipping(backend, params, packed, item)
    repacking, saved = (
        packing_memory(model, packed, writes=packed),
        packed.nbytes + (item - ITEM_BYTES[model.dtype]) * _dense_weights(packed),
    )
    ram = peak(
        dense | states | ({} if on_gpu else layer),
        dense | {"packed layers": packed.nbytes},
        repacking.ram | resident_memory("the result", packed, on_gpu=False)[1],
    )
    memory = Memory(ram=ram, disk=repacking.disk | {"what the backend saves": saved})
    weights = layer_bytes(model) * item // ITEM_BYTES[model.dtype]
    return memory.model_copy(update={"vram": {"one layer": weights, **states, **layer}}) if on_gpu else memory


def _dense_weights(packed: ModelSpec) -> int:
    return sum(group.num_parameters for group in packed.groups if group.format.is_dense)


def _clipping(backend: Backend, params: CalibratedQuantization, packed: ModelSpec, item: int) -> dict[str, int]:
    """Of a library's AWQ: inputs of every Linear layer of a decoder layer are kept; each threshold is tried on some tokens."""
    if not backend.clips:
        return {}
    shapes = [group.shape for group in packed.linear_groups if group.layers]
    tokens = math.ceil(params.tokens / max(1, params.tokens // CLIP_TOKENS))
    return {
        "inputs of one layer's Linear layers": params.tokens * sum(columns for _, columns in shapes) * item,
        "products that try a threshold": min(CLIP_ROWS, max(rows for rows, _ in shapes))
        * tokens
        * max(columns for _, columns in shapes)
        * item,
    }
