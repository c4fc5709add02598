"""AWQ: scale up the input channels that matter before rounding, and scale what feeds them down by as much."""

import math
from collections import Counter
from typing import Literal

from pydantic import Field

from pipeline.artifact import Dataset, DenseCheckpoint, QuantizedCheckpoint
from pipeline.artifact_spec import DatasetSpec
from pipeline.roofline import Work, attention_flops
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, MAIN, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.backends import AWQ_BACKENDS, Backend, backend_memory, backend_sentences, check_backend
from stages.runtime.peak_memory import layer_bytes, peak
from stages.runtime.scheme import CalibratedQuantization, CalibrationExecution, batch_memory, calibration_memory
from stages.runtime.smoothing import has_grouped_queries, smoothings
from stages.runtime.stage_work import calibrated_clipping, calibrating
from stages.runtime.training_settings import check_windows

SEARCH_TRAFFIC = 320  # bytes moved for each weight of a candidate: 38e6 weights a second of one core, at 0.4 of the 31 GB/s it copies with
SEARCH_BYTES = 28  # working memory for each weight of the matrix being tried, measured: it is scaled, rounded and unscaled in float64


class AWQ(Stage):
    """Multiply each input channel's weights by a scale s, round them to nearest, and divide the channel's inputs by s, so that
    channels with large inputs are rounded finest (activation-aware weight quantization, Lin et al., 2023,
    https://arxiv.org/abs/2306.00978).

    s = x^r / w^(1 - r), of the channel's mean input and weight magnitudes; attention, MLP and down_proj each take the r in [0, 1]
    with which rounding changes their output least. `duo_scaling: false` is the paper's s = x^r. The paper's second search, for
    clipping thresholds, is not in llm-compressor and is left out.

    Runs llm-compressor's sequential pipeline; every layer is calibrated on the unquantized model's hidden states. The layer in turn
    is moved to the GPU, where there is one; the others wait in RAM or, with `offload: disk`, in their files. The division
    is folded into norms and preceding layers (stages/runtime/smoothing.py), whose tensors therefore differ from the source's.

    `backend` is the library that searches and rounds: llm-compressor, or autoawq or gptqmodel, each in an environment of its own
    (stages/runtime/backends.py); what comes of it is the same kind of checkpoint.

    Asymmetric by default, unlike gptq and rtn: the authors' code and AutoAWQ (`zero_point: true`) round that way.
    """

    name, version = "awq", 1
    libraries = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    lightens = {"execution.batch_size": HALVES, "execution.offload": ("disk",), "num_samples": HALVES}

    class Params(CalibratedQuantization):
        symmetric: bool = False
        n_grid: int = Field(default=20, ge=3)  # values of r tried for each module, no scaling at all among them
        duo_scaling: bool = True
        backend: Literal["llmcompressor", "autoawq", "gptqmodel"] = "llmcompressor"

    class Execution(CalibrationExecution):
        pass

    params: Params
    execution: Execution

    @property
    def backend(self) -> Backend | None:
        return AWQ_BACKENDS.get(self.params.backend)

    @property
    def env(self) -> str:
        return self.backend.env if self.backend else MAIN

    @property
    def computes(self) -> bool:
        return self.backend is None  # the others compute in dtypes of their own

    def infer(self, model: ModelSpec, calibration: DatasetSpec) -> ModelSpec:
        quantized = self.params.apply(model)
        check_backend(self.backend, self.params, self.execution, model)
        check_windows(self.params.num_samples, self.params.max_length, calibration, model)
        return quantized

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target) -> Memory:
        """While the scales of one decoder layer are searched: the inputs of its searched modules are kept for every window."""
        packed, item, tokens = self.params.apply(model), self.params.item, self.params.tokens
        in_memory = self.params.in_memory(model)
        shapes = {name: group.shape for group in packed.linear_groups for name in group.module_names}
        inputs: Counter[str] = Counter()  # decoder layer -> columns of what its searched modules read
        copies, rounded, changed = 0, 0, set[str]()
        for pair in smoothings(packed):
            weights = [math.prod(shapes[name]) for name in pair.balance]
            copies, rounded = max(copies, item * sum(weights)), max(rounded, *weights)
            inputs[pair.searched.split(".")[2]] += shapes[pair.balance[0]][1]
            changed |= {pair.smooth, *pair.balance}
        search = {
            "outputs of one module, dense and rounded": 2 * tokens * model.architecture.hidden_size * item,
            "copies of one module's weights": copies,
            **peak(  # weights are scaled and rounded, then their module runs
                {"working memory of one weight": SEARCH_BYTES * rounded},
                {"activations of one batch": batch_memory(self.params, in_memory, self.execution.batch_size)},
            ),
        }
        if self.backend:
            return backend_memory(self.backend, self.params, self.execution, model, search, self.on_gpu(target))
        kept = {"inputs of one layer's searched modules": tokens * item * max(inputs.values(), default=0)}
        on_gpu = self.on_gpu(target)
        held = calibration_memory(self.params, self.params, self.execution, model, packed, changed, kept if on_gpu else kept | search)
        return held.model_copy(update={"vram": {"one layer": layer_bytes(in_memory), **search}}) if on_gpu else held

    def work(self, model: ModelSpec, calibration: DatasetSpec) -> Work:
        """For every r the weights are scaled and rounded, and their module runs on all windows; once more it runs dense."""
        packed, p = self.params.apply(model), self.params
        sizes: Counter[str] = Counter()  # weights of Linear layers, and of the modules that hold them
        for group in packed.linear_groups:
            weights = math.prod(group.shape)
            for name in group.module_names:
                sizes[name] += weights
                sizes[name.rpartition(".")[0]] += weights
        attention = attention_flops(model, p.max_length) / model.architecture.num_layers
        flops, nbytes, changed = 0.0, 0.0, set[str]()
        for pair in smoothings(packed):
            flops += 2 * sizes[pair.searched] + attention * pair.searched.endswith("self_attn")
            nbytes += SEARCH_TRAFFIC * sum(sizes[name] for name in pair.balance)
            changed |= {pair.smooth, *pair.balance}
        searching = p.products((p.n_grid + 1) * p.tokens * flops) + Work(nbytes=p.n_grid * nbytes)
        found = calibrated_clipping(packed, p.ranges)
        return calibrating(p, p, self.execution, model, packed, changed, calibration) + searching + found

    def explain(self, model: ModelSpec, calibration: DatasetSpec) -> list[str]:
        shape, sentences = model.architecture, self.params.explain() + backend_sentences(self.backend)
        if self.params.observer == "mse":
            sentences.append("observer mse: scales are searched with whole ranges, as llm-compressor does; then the weights are clipped")
        if has_grouped_queries(model):
            sentences.append(
                f"o_proj is rounded without scaling: {shape.num_heads} query heads share {shape.num_kv_heads} KV heads, "
                "so v_proj cannot take the division"
            )
        return sentences

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset) -> QuantizedCheckpoint:
        if self.backend:
            from stages.runtime.isolated_quantization import quantize_isolated

            names = {"num_bits", "group_size", "symmetric", "duo_scaling"} & self.backend.honours
            settings = self.params.model_dump(include=names) | {"batch_size": self.execution.batch_size}
            return quantize_isolated(ctx, model, calibration, self.params, self.backend, settings, folds_scales=True)
        import torch
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQMapping

        from stages.runtime.oneshot import StrictAWQ, quantize_calibrated
        from stages.runtime.packing import scheme_of
        from stages.runtime.tensors import DTYPES

        params, source = self.params, model.model_spec
        pairs = smoothings(params.apply(source))
        scale = StrictAWQ(
            mappings=[AWQMapping(pair.smooth, list(pair.balance)) for pair in pairs],
            n_grid=params.n_grid,
            duo_scaling=params.duo_scaling,
            offload_device=torch.device("cpu"),  # one layer's inputs for all windows; the library would keep them on the accelerator
        )
        scheme, ignore = (
            scheme_of(params.format, observer=params.ranges, scale_dtype=DTYPES[source.dtype]),
            list(params.ignored_names(source)),
        )
        round_to_nearest = QuantizationModifier(config_groups={"group_0": scheme}, ignore=ignore)
        searched = {pair.searched: params.n_grid + 1 for pair in pairs}  # once dense, then for every r
        return quantize_calibrated(ctx, model, calibration, params, self.execution, [scale, round_to_nearest], searched=searched)
