"""What rounding each part of a model costs, measured part by part: what mixed precision is decided by."""

import json
import math

from pydantic import Field, field_validator

from pipeline.artifact import SENSITIVITY_FILE, Dataset, DenseCheckpoint, Sensitivity
from pipeline.artifact_spec import DatasetSpec, SensitivitySpec
from pipeline.compute_dtype import Computing
from pipeline.layout import WeightFormat
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Size, Target
from stages.runtime.layerwise_settings import Device
from stages.runtime.mixed_bits import layer_of, units_of
from stages.runtime.mixed_precision import Bits, several
from stages.runtime.peak_memory import freed_activations, layer_bytes, peak, widest
from stages.runtime.scheme import ROUNDING_BYTES, Ignore, pack_layers
from stages.runtime.stage_work import forward_flops, reading, tokenizing
from stages.runtime.training_settings import check_windows
from stages.runtime.windows import HIDDEN_STATES, LOGITS_BUFFERS, LOGITS_BYTES

MOST_VARIANTS = 64  # carried through the model at once: each time the model itself is computed too, and what was measured is kept
DIVERGENCE_BYTES = 40  # moved for each token and word: logits of a variant to probabilities, their difference, its product and sum


class MeasureSensitivity(Stage):
    """The KL divergence of a model's outputs from themselves when one unit alone is rounded to nearest, for every unit and width.

    A unit is what gets its bits together: a Linear layer, or `fused` the layers that engines compute in one product (queries, keys and
    values; gate and up projection). The divergence is that of the distributions over the next token, KL(model || rounded), in nats, mean
    over all positions of the calibration text; to spend bits where it says is the idea of Dong et al. (HAWQ, 2019,
    https://arxiv.org/abs/1905.03293), who estimate it from second derivatives. Here it is measured: all variants are carried through the
    model side by side, layer by layer, so that what comes before a unit is computed once (stages/runtime/sensitivity.py).

    That losses add up is an assumption: the interaction of two rounded units is not measured. `evaluate` shows what they cost together.
    Metrics: `divergence_<n>_bits`, of all units at that width, added up. `sensitivity.json`: a `SensitivitySpec`.
    """

    name, version, resumes = "sensitivity", 1, True
    libraries = ("torch", "transformers", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.hidden_states": (1 << 30,)}

    class Params(Computing, Stage.Params):
        choices: tuple[Bits, ...] = (3, 4, 5, 8)  # widths that are tried
        group_size: int = Field(default=128, ge=1)
        symmetric: bool = True
        ignore: Ignore = ("lm_head",)
        fused: bool = True  # False: queries, keys, values, gate and up projection on their own, which transformers reads and vLLM does not
        num_samples: int = Field(default=16, ge=1)  # windows of text, evenly spaced over it ...
        max_length: int = Field(default=256, ge=2)  # ... and their tokens

        _several = field_validator("choices")(several)

    class Execution(Stage.Execution):
        batch_size: int = Field(default=8, ge=1)  # windows in one forward
        hidden_states: Size = Field(default=HIDDEN_STATES, ge=1)  # RAM for the variants' text in flight
        device: Device = "auto"

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, calibration: DatasetSpec) -> SensitivitySpec:
        if model.architecture.experts:
            raise ValueError(
                f"sensitivity is not measured of a mixture of experts yet, and {model.architecture.model_type} is one; "
                "give its layers the same num_bits"
            )
        check_windows(self.params.num_samples, self.params.max_length, calibration, model)
        p = self.params
        units = tuple(units_of(self._packed(model), p.fused))
        return SensitivitySpec(choices=p.choices, group_size=p.group_size, symmetric=p.symmetric, fused=p.fused, units=units)

    def memory(self, model: ModelSpec, calibration: DatasetSpec, target: Target) -> Memory:
        model = self.params.in_memory(model)
        shape, item, p = model.architecture, self.params.item, self.params
        tokens = min(self.execution.batch_size, p.num_samples) * p.max_length
        linears = [group for group in model.linear_groups if group.layers]
        held = {"hidden states of the model and its variants": (self._at_once(model) + 1) * self._state_bytes(model)}
        layer = {
            "one decoder layer": layer_bytes(model),
            "working copies of one weight": ROUNDING_BYTES * max(math.prod(group.shape) for group in linears),
            "activations of one layer": tokens * widest(shape) * item,
            "freed blocks that the allocator keeps": freed_activations(model, tokens),
        }
        head = {
            "output embedding": shape.vocab_size * shape.hidden_size * item,
            "logits of a chunk of tokens": LOGITS_BUFFERS * min(LOGITS_BYTES, 4 * tokens * shape.vocab_size),
        }
        text = {"the text and its token ids": 10 * calibration.nbytes}
        if self.on_gpu(target):
            return Memory(ram=text | held, vram=peak(layer, head))
        return Memory(ram=text | held | peak(layer, head))

    def work(self, model: ModelSpec, calibration: DatasetSpec) -> Work:
        """Each variant is computed from its own layer on; the model itself, and its weights read, once for each sweep."""
        p, layers = self.params, model.architecture.num_layers
        variants = [(layer_of(modules, layers), len(p.choices)) for modules in units_of(self._packed(model), p.fused).values()]
        count = sum(number for _, number in variants)
        sweeps, tokens = math.ceil(count / self._at_once(model)), p.num_samples * p.max_length
        decoder = forward_flops(model, tokens, p.max_length, head=False)
        head = forward_flops(model, tokens, p.max_length) - decoder
        passed = sweeps + sum(number * (layers - first) for first, number in variants) / layers
        compared = (sweeps + count) * tokens * model.architecture.vocab_size * DIVERGENCE_BYTES
        multiplied = p.products(passed * decoder + (sweeps + count) * head)
        return tokenizing(calibration) + reading(model, sweeps) + multiplied + Work(nbytes=compared)

    def explain(self, model: ModelSpec, calibration: DatasetSpec) -> list[str]:
        units = len(units_of(self._packed(model), self.params.fused))
        widths = ", ".join(map(str, self.params.choices))
        return [f"{units} units x {widths} bits: {units * len(self.params.choices)} variants, each computed from its own layer on"]

    def run(self, ctx: Context, model: DenseCheckpoint, calibration: Dataset) -> Sensitivity:
        from stages.runtime.layerwise import LayerwiseModel, micro_batches
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.sensitivity import measure
        from stages.runtime.text import calibration_windows, load_tokenizer

        p, spec = self.params, model.model_spec
        assert isinstance(calibration.spec, DatasetSpec), "a plan gives every dataset its spec"
        windows = calibration_windows(calibration, load_tokenizer(model.path), p.num_samples, p.max_length)
        source = LayerwiseModel(model.path, COMPUTE_DTYPES[p.computes_in], resolve_device(self.execution.device))
        batches = micro_batches(windows, self.execution.batch_size * p.max_length)
        asked = self.infer(spec, calibration.spec)
        found = measure(ctx, source, units_of(self._packed(spec), p.fused), asked, batches, self._at_once(spec))
        measured = asked.model_copy(update={"divergence": found})
        (ctx.output / SENSITIVITY_FILE).write_text(json.dumps(measured.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        totals = {f"divergence_{bits}_bits": sum(row[n] for row in found) for n, bits in enumerate(p.choices)}
        return Sensitivity(path=ctx.output, spec=measured, metrics=totals)

    def _packed(self, model: ModelSpec) -> ModelSpec:
        """With every layer packed that is measured. ValueError as of a quantizer's `ignore` and `group_size`."""
        p = self.params
        form = WeightFormat(num_bits=p.choices[0], group_size=p.group_size, symmetric=p.symmetric)
        return pack_layers(model, form, p.ignore)

    def _state_bytes(self, model: ModelSpec) -> int:
        """Of one variant's hidden states."""
        return self.params.num_samples * self.params.max_length * model.architecture.hidden_size * self.params.item

    def _at_once(self, model: ModelSpec) -> int:
        """Variants in one sweep, beside the model itself; at least those of one unit."""
        room = self.execution.hidden_states // self._state_bytes(model) - 1
        return max(len(self.params.choices), min(MOST_VARIANTS, room))
