"""GPTQ: round weights so that the layer's output, not each weight, changes least."""

from typing import Literal

from pydantic import Field

from pipeline.artifact import Dataset, DatasetSpec, DenseCheckpoint, QuantizedCheckpoint
from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.scheme import WeightQuantization, packing_memory


class GPTQ(Stage):
    """Round weights column by column, each time correcting the columns still to come with the inverse Hessian of the
    layer's inputs (Frantar et al., 2022, https://arxiv.org/abs/2210.17323).

    Runs llm-compressor's sequential pipeline: decoder layer by decoder layer, each calibrated on the outputs of the layers
    already quantized. `actorder: static` visits columns by falling Hessian diagonal and keeps groups where they are, so
    it costs nothing at inference (the library's `weight` is another name for it).
    """

    name, version = "gptq", 1
    libraries = ("torch", "transformers", "compressed-tensors", "llmcompressor")

    class Params(WeightQuantization):
        actorder: Literal["static"] | None = "static"
        dampening_frac: float = Field(default=0.01, ge=0)  # of the Hessian's mean diagonal, added to its diagonal
        block_size: int = Field(default=128, ge=1)  # columns between two updates of all columns to come
        num_samples: int = Field(default=128, ge=1)  # calibration windows ...
        max_length: int = Field(default=256, ge=2)  # ... and their tokens; 2048 is usual for models of a billion weights and more

    class Execution(Stage.Execution):
        batch_size: int = Field(default=8, ge=1)  # calibration windows in one forward

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, calibration: DatasetSpec) -> ModelSpec:
        positions = model.architecture.max_position
        if self.params.max_length > positions:
            raise ValueError(
                f"max_length {self.params.max_length} is more than the model's {positions} positions; write {positions} or less"
            )
        return self.params.apply(model)

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target) -> Memory:
        """While the widest decoder layer is quantized: all Hessians of a layer are gathered in the same forward passes."""
        quantized, shape, item = self.params.apply(model), model.architecture, ITEM_BYTES[model.dtype]
        linears = [group for group in quantized.groups if not group.format.is_dense and group.layers]
        hessians = sum(4 * group.shape[1] ** 2 for group in linears)
        working = max((4 * max(g.shape[1] ** 2 + 3 * g.shape[0] * g.shape[1], 3 * g.shape[1] ** 2) for g in linears), default=0)
        tokens = self.params.num_samples * self.params.max_length
        batch = self.execution.batch_size * self.params.max_length
        widest = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.num_heads * shape.head_dim
        layer = {
            "Hessians of one layer": hessians,
            "working copies of one weight and its Hessian": working,
            "activations of one batch": batch * (widest * item + 4 * shape.intermediate_size),
        }
        ram = {"model": model.nbytes, "calibration hidden states": 2 * tokens * shape.hidden_size * item}
        if shape.tied:
            ram["untied copy of the embedding"] = shape.vocab_size * shape.hidden_size * item
        ram |= packing_memory(model, quantized, writes=quantized).ram
        disk = {"checkpoint": quantized.nbytes}
        if target.gpus:
            return Memory(ram=ram, vram={"one layer": sum(4 * g.shape[0] * g.shape[1] for g in linears), **layer}, disk=disk)
        return Memory(ram=ram | layer, disk=disk)

    def explain(self, model: ModelSpec, calibration: DatasetSpec) -> list[str]:
        return self.params.explain()

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset) -> QuantizedCheckpoint:
        from stages.runtime.guard import check_probe
        from stages.runtime.loading import load_model
        from stages.runtime.oneshot import GPTQWithReport, run_oneshot
        from stages.runtime.packing import calibrated_packer, quantization_config, scheme_of, write_quantized
        from stages.runtime.scoring import token_losses
        from stages.runtime.text import calibration_windows, load_tokenizer

        source, form, params = model.model_spec, self.params.format, self.params
        spec, ignore = params.apply(source), params.ignored_names(source)
        tokenizer = load_tokenizer(model.path)
        windows = calibration_windows(calibration, tokenizer, params.num_samples, params.max_length)
        modifier = GPTQWithReport(
            config_groups={"group_0": scheme_of(form)},
            ignore=list(ignore),
            actorder=params.actorder,
            dampening_frac=params.dampening_frac,
            block_size=params.block_size,
        )
        resident = load_model(model.path)
        run_oneshot(resident, tokenizer, modifier, windows, self.execution.batch_size, ctx)
        if modifier.fallbacks:
            ctx.note(
                f"{len(modifier.fallbacks)} layers were rounded to nearest because their Hessian could not be inverted: "
                f"{', '.join(modifier.fallbacks[:5])}; raise dampening_frac or num_samples"
            )
        losses = token_losses(resident, windows[:1])
        write_quantized(ctx, model, spec, quantization_config(form, ignore, params.actorder), calibrated_packer(resident, form))
        resident.to("meta")  # free its memory for the probe's copy; `del` would not: torch.fx's tracer keeps a reference
        check_probe(losses, ctx.output, windows[:1])
        return QuantizedCheckpoint(path=ctx.output, spec=spec)
