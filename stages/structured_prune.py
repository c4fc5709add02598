"""Structured pruning: whole attention heads, MLP neurons and layers leave, and an ordinary smaller dense model remains.

Width is chosen per layer, by weight magnitude or by what flows through a unit on the calibration set (Minitron: Muralidharan et
al., 2024, https://arxiv.org/abs/2407.14679); depth by block influence (ShortGPT: Men et al., 2024,
https://arxiv.org/abs/2403.03853), which needs the calibration set whatever `importance` says. Weights stream: the stage holds
one layer. A Llama config whose heads no longer divide its hidden size is refused by transformers; the same weights
are then written as Mistral, which computes the same.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.architecture import Architecture
from pipeline.artifact import Dataset, DenseCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.peak_memory import peak
from stages.runtime.prune_sizes import default_round_to, group_axis, layer_axis, neuron_axis, query_axis
from stages.runtime.sparsity_settings import described
from stages.runtime.stage_work import CUT, forward_flops, publishing, reading, tokenizing
from stages.runtime.sweep_memory import HIDDEN_STATES, sweep_memory

if TYPE_CHECKING:
    from stages.runtime.activations import ActivationStatistics


class StructuredPrune(Stage):
    """Remove heads, MLP neurons and layers of a dense model, by ratio or to a given size."""

    name, version = "structured_prune", 1
    libraries = ("torch", "transformers")
    lightens = {"num_samples": HALVES}

    class Params(Computing, Stage.Params):
        """Ratios are fractions removed; sizes are what is kept. An axis is pruned by one of them or left alone."""

        head_ratio: float = Field(0.0, ge=0, lt=1)
        mlp_ratio: float = Field(0.0, ge=0, lt=1)
        layer_ratio: float = Field(0.0, ge=0, lt=1)
        num_kv_heads: int | None = Field(None, ge=1)  # with heads: groups
        num_heads: int | None = Field(None, ge=1)  # with heads: queries
        intermediate_size: int | None = Field(None, ge=1)
        num_layers: int | None = Field(None, ge=1)
        heads: Literal["groups", "queries"] = "groups"  # whole KV heads with their query heads, or query heads evenly within each
        importance: Literal["magnitude", "activation"] = "magnitude"
        round_to: int | None = Field(None, ge=1)  # MLP width, for mlp_ratio; default 1024 from a width of 8192 up, else 256
        group_size: int = Field(128, ge=1)  # widths stay divisible by it, for a later quantization
        num_samples: int = Field(128, ge=1)  # calibration windows
        max_length: int = Field(512, ge=2)  # tokens in each

        @property
        def prunes_heads(self) -> bool:
            return bool(self.head_ratio) or self.num_kv_heads is not None or self.num_heads is not None

        @property
        def prunes_mlp(self) -> bool:
            return bool(self.mlp_ratio) or self.intermediate_size is not None

        @property
        def prunes_layers(self) -> bool:
            return bool(self.layer_ratio) or self.num_layers is not None

        @property
        def calibrates(self) -> bool:
            return self.importance == "activation" or self.prunes_layers

    class Execution(Stage.Execution):
        device: Literal["auto", "cpu", "cuda"] = "auto"  # of the calibration

    params: Params
    execution: Execution

    @property
    def computes(self) -> bool:
        return self.params.calibrates

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.calibrates else frozenset({"calibration"})

    def on_gpu(self, target: Target) -> bool:
        return self.params.calibrates and super().on_gpu(target)

    def infer(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> ModelSpec:
        if self.params.calibrates and calibration is None:
            raise ValueError(
                "calibration: importance activation and the pruning of layers need a calibration set; give data.splits.calibration"
            )
        return self._pruned(model)

    def _pruned(self, model: ModelSpec) -> ModelSpec:
        problems = contradictions(self.params)
        if self.execution.device != "auto" and not self.params.calibrates:
            problems.append("execution.device: only a calibration computes on it; leave it out, or write importance: activation")
        if problems:
            raise InputProblems(problems)
        return model.resized(pruned_architecture(self.params, model.architecture))

    def explain(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> list[str]:
        p, old, new = self.params, model.architecture, pruned_architecture(self.params, model.architecture)
        heads = f"{new.num_heads} query / {new.num_kv_heads} KV heads"
        sentences = []
        if p.prunes_heads:
            sentences.append(removal("heads", p.head_ratio, old.num_heads, new.num_heads, heads))
        if p.prunes_mlp:
            sentences.append(removal("MLP", p.mlp_ratio, old.intermediate_size, new.intermediate_size, f"width {new.intermediate_size}"))
        if p.prunes_layers:
            sentences.append(
                removal("layers", p.layer_ratio, old.num_layers, new.num_layers, f"{new.num_layers} of {old.num_layers} layers")
            )
        if model.sparsity and not model.resized(new).sparsity:
            sentences.append(f"zeros: columns go one by one, so that nothing is known of zeros any more ({described(model)} before)")
        if p.prunes_layers and p.importance == "magnitude":
            sentences.append("layers: chosen by block influence, so the calibration set is used")
        if new.model_type != old.model_type:
            sentences.append(
                f"model_type: written as {new.model_type}, because transformers refuses a llama config whose "
                f"hidden_size {old.hidden_size} is not a multiple of {new.num_heads} heads; the logits are the same"
            )
        return sentences

    def memory(self, model: ModelSpec, target: Target, calibration: DatasetSpec | None = None) -> Memory:
        """Beyond the interpreter and its libraries. The calibration sweep and the cut follow each other: the larger counts."""
        output, a, p = self._pruned(model), model.architecture, self.params
        cut, disk = cutting_memory(p, a), {"checkpoint": output.nbytes}
        if not p.calibrates:
            return Memory(ram=cut, disk=disk)
        sweep = sweep_memory(p.in_memory(model), p.num_samples, p.max_length)
        kept = {HIDDEN_STATES: sweep.pop(HIDDEN_STATES), "statistics": 8 * a.num_layers * (a.intermediate_size + a.num_heads)}
        on_gpu = self.on_gpu(target)
        return Memory(ram=peak(cut, kept if on_gpu else sweep | kept), vram=sweep if on_gpu else {}, disk=disk)

    def work(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> Work:
        """All of it on the CPU but the calibration's sweep."""
        cut = reading(model) + Work(cpu=model.num_parameters / CUT) + publishing(self._pruned(model))
        if calibration is None:
            return cut
        p = self.params
        sweep = p.products(forward_flops(model, p.num_samples * p.max_length, p.max_length, head=False))
        return cut + sweep + reading(model) + tokenizing(calibration)

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset | None = None) -> DenseCheckpoint:
        from stages.functional.importance import highest
        from stages.runtime.pruning import Pruner, pruned_config
        from stages.runtime.tensors import TensorReader, copy_companions

        p, source, reader = self.params, model.model_spec, TensorReader(model.path)
        problems = source.differences(reader.table)
        if problems:
            raise ValueError(f"{model.path} is not the model its config.json describes: {'; '.join(problems[:5])}")
        spec, kept_layers = self._pruned(source), list(range(source.architecture.num_layers))
        pruner = Pruner(reader, source.architecture, spec.architecture, p.heads)
        if p.calibrates:
            statistics = self._measure(ctx, model, calibration)
            if p.importance == "activation":
                pruner.head_scores, pruner.neuron_scores = statistics.heads, statistics.neurons
            if p.prunes_layers:
                influence = statistics.influence
                kept_layers = highest(influence, spec.architecture.num_layers).tolist()
                gone = [f"{i} ({score:.3f})" for i, score in enumerate(influence.tolist()) if i not in kept_layers]
                ctx.note(f"layers removed, with their block influence: {', '.join(gone)}")
        pruner.write(ctx.output, kept_layers, lambda done, total: ctx.progress("pruning", done, total))
        copy_companions(model.path, ctx.output, pruned_config(model.config, spec.architecture, kept_layers))
        return DenseCheckpoint(path=ctx.output, spec=spec)

    def _measure(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset | None) -> "ActivationStatistics":
        """Apart from `run`, because these imports bring transformers, which pruning by magnitude does without."""
        from stages.runtime.activations import measure_activations
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.text import calibration_windows, load_tokenizer

        assert calibration is not None, "infer has refused it"
        windows = calibration_windows(calibration, load_tokenizer(model.path), self.params.num_samples, self.params.max_length)
        device, dtype = resolve_device(self.execution.device), COMPUTE_DTYPES[self.params.computes_in]
        return measure_activations(model.path, windows, partial(ctx.progress, "measuring"), device, dtype)


def contradictions(p: StructuredPrune.Params) -> list[str]:
    """Settings that exclude each other or have no effect, a sentence each."""
    sizes = {"head_ratio": ("num_kv_heads", "num_heads"), "mlp_ratio": ("intermediate_size",), "layer_ratio": ("num_layers",)}
    problems = [
        f"{ratio}: it and {size} both say how much to remove; give one of them"
        for ratio, names in sizes.items()
        for size in names
        if getattr(p, ratio) and getattr(p, size) is not None
    ]
    size, other = ("num_kv_heads", "num_heads") if p.heads == "groups" else ("num_heads", "num_kv_heads")
    if getattr(p, other) is not None:
        problems.append(f"{other}: heads: {p.heads} is sized by {size}; write {size}, or change heads")
    if not (p.prunes_heads or p.prunes_mlp or p.prunes_layers):
        problems.append("head_ratio: nothing is pruned; give head_ratio, mlp_ratio or layer_ratio, or a size to keep")
    width = p.prunes_heads or p.prunes_mlp
    needs = {
        "heads": (p.prunes_heads, "heads are pruned"),
        "importance": (width, "heads or the MLP are pruned"),
        "round_to": (bool(p.mlp_ratio), "mlp_ratio is given"),
        "group_size": (width, "heads or the MLP are pruned"),
        "num_samples": (p.calibrates, "importance is activation or layers are pruned"),
        "max_length": (p.calibrates, "importance is activation or layers are pruned"),
    }
    changed = p.model_dump(exclude_defaults=True)
    problems += [
        f"{name}: it has an effect only where {when}; leave it out" for name, (used, when) in needs.items() if name in changed and not used
    ]
    return problems


def pruned_architecture(p: StructuredPrune.Params, a: Architecture) -> Architecture:
    """The architecture that is left of `a`. ValueError names every field that asks for something impossible."""
    sizes = {"num_kv_heads": a.num_kv_heads, "num_heads": a.num_heads, "intermediate_size": a.intermediate_size, "num_layers": a.num_layers}
    head_axis, head_size = (group_axis, "num_kv_heads") if p.heads == "groups" else (query_axis, "num_heads")
    round_to = p.round_to or default_round_to(a.intermediate_size)
    asked = [
        (p.prunes_heads, head_axis(a, p.group_size), "head_ratio", p.head_ratio, head_size),
        (p.prunes_mlp, neuron_axis(a, p.group_size, round_to if p.mlp_ratio else 1), "mlp_ratio", p.mlp_ratio, "intermediate_size"),
        (p.prunes_layers, layer_axis(a), "layer_ratio", p.layer_ratio, "num_layers"),
    ]
    problems = []
    for prunes, axis, ratio_field, ratio, size_field in asked:
        try:
            if prunes:
                sizes[size_field] = axis.by_ratio(ratio_field, ratio) if ratio else axis.by_count(size_field, getattr(p, size_field))
        except ValueError as error:
            problems.append(str(error))
    if p.prunes_heads and p.heads == "groups":
        sizes["num_heads"] = sizes["num_kv_heads"] * (a.num_heads // a.num_kv_heads)
    if problems:
        raise InputProblems(problems)
    new = a.model_copy(update=sizes)
    if new.model_type != "llama" or new.hidden_size % new.num_heads == 0:
        return new
    if new.qkv_bias or new.mlp_bias:
        field = "head_ratio" if p.head_ratio else head_size
        raise ValueError(
            f"{field}: {new.num_heads} heads do not divide hidden_size {new.hidden_size}: transformers refuses such a llama config, "
            "and mistral, which is written instead, has no biases; keep heads that divide it"
        )
    return new.model_copy(update={"model_type": "mistral"})


def removal(name: str, ratio: float, before: int, after: int, left: str) -> str:
    """`heads: asked to remove 20.0 %, 25.0 % is the nearest (48 query / 6 KV heads)`. `ratio` is 0 where a size was given."""
    asked, actual = f"{100 * ratio:.1f} %", f"{100 * (1 - after / before):.1f} %"
    if ratio and asked != actual:
        return f"{name}: asked to remove {asked}, {actual} is the nearest ({left})"
    return f"{name}: removes {actual} ({left})"


def cutting_memory(p: StructuredPrune.Params, old: Architecture) -> dict[str, int]:
    """One layer's matrices that are cut are held together, because they are scored together."""
    item, width = ITEM_BYTES[old.dtype], old.num_heads * old.head_dim
    attention = 2 * old.hidden_size * (width + old.num_kv_heads * old.head_dim) if p.prunes_heads else 0
    mlp = 3 * old.hidden_size * old.intermediate_size if p.prunes_mlp else 0
    return {
        "the matrices of one layer": (attention + mlp) * item,
        "rows being scored": 2 * 4 * max(1 << 17, width, old.intermediate_size),
        "rows being written": 1 << 20,
    }
