"""Store the KV cache of a served model as INT8: half the memory of a 16-bit cache, so twice the context or twice the batch."""

from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from pipeline.artifact import Checkpoint, Dataset
from pipeline.artifact_spec import DatasetSpec
from pipeline.companions import CACHE_FILE, SCALES_FILE
from pipeline.compute_dtype import Computing
from pipeline.kv_sidecar import CacheSettings, write_cache
from pipeline.layout import CacheMode
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.linked_folder import link_checkpoint
from stages.runtime.stage_work import counting_zeros, forward_flops, reading, tokenizing
from stages.runtime.sweep_memory import HIDDEN_STATES, sweep_memory

C = TypeVar("C", bound=Checkpoint)
CALIBRATION = {"num_samples": 128, "max_length": 256}  # of mode static, where the recipe is silent
SERVED_BY: dict[CacheMode, str] = {
    "per_token_head": "served by vLLM with `--kv-cache-dtype int8_per_token_head`; plain transformers keeps a 16-bit cache",
    "static": "no mainstream server loads calibrated INT8 scales (vLLM refuses them, older versions ran FP8 with them): they are in a file "
    "of their own that llmpress reads; plain transformers keeps a 16-bit cache",
}


class KVCache(Stage):
    """Say how the KV cache is stored, in `kv_cache.json` beside the weights; the weights stay what they are.

    `per_token_head` scales each key and value vector by its own largest magnitude and needs no calibration; the scales add 4 bytes to
    each vector. `static` has one scale for each layer, KV head, and key or value: the largest magnitude found on the calibration text.
    It is as small as INT8 can be, cuts off what is larger than anything calibrated, and is valid for these very weights only.
    Both are symmetric (stages/functional/int8.py). Keys are quantized after their rotary embedding, as a cache holds them.

    Published files of the input are hard-linked, so that the stage takes no room whatever the model's size.
    """

    name, version = "kv_cache", 1
    keeps_weights = True
    libraries = ("torch", "transformers", "compressed-tensors")
    lightens = {"num_samples": HALVES}

    class Params(Computing, Stage.Params):
        mode: CacheMode = "per_token_head"
        num_samples: int | None = Field(default=None, ge=1)  # static: calibration windows, 128 if not given ...
        max_length: int | None = Field(default=None, ge=2)  # ... of so many tokens, 256 if not given

        @model_validator(mode="before")
        @classmethod
        def _calibrate_where_static(cls, given: Any) -> Any:
            """What is not given is filled in here, so that it is part of the key of `static` and of no other mode."""
            if not isinstance(given, dict) or given.get("mode") != "static":
                return given
            return given | {name: value for name, value in CALIBRATION.items() if given.get(name) is None}

    class Execution(Stage.Execution):
        device: Literal["auto", "cpu", "cuda"] = "auto"  # of the calibration

    params: Params
    execution: Execution

    @property
    def computes(self) -> bool:
        return self.params.mode == "static"

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.mode == "static" else frozenset({"calibration"})

    def infer(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> ModelSpec:
        p, device = self.params, self.execution.device
        if p.mode == model.kv_cache.mode:
            raise ValueError(f"mode: the model's cache is {p.mode} already; leave this stage out or write the other mode")
        if p.mode != "static":
            given = [name for name in CALIBRATION if getattr(p, name) is not None]
            given += ["device"] if device != "auto" else []
            if given:
                raise ValueError(f"{given[0]}: {p.mode} needs no calibration, so it has no effect; leave it out or write mode: static")
        elif calibration is None:
            raise ValueError("calibration: mode static needs a calibration set; give data.splits.calibration or write mode: per_token_head")
        elif self._calibration[1] > model.architecture.max_position:
            raise ValueError(
                f"max_length: {p.max_length} is more than the model's {model.architecture.max_position} positions; write that or less"
            )
        return model.with_cache(p.mode)

    @property
    def _calibration(self) -> tuple[int, int]:
        """Windows and tokens in each, of mode static."""
        assert self.params.num_samples and self.params.max_length, "filled in by Params"
        return self.params.num_samples, self.params.max_length

    def memory(self, model: ModelSpec, target: Target, calibration: DatasetSpec | None = None) -> Memory:
        """Calibration holds one layer. Disk: weights are linked; those of a source folder are copied, but no spec tells which it is."""
        if self.params.mode != "static":
            return Memory()
        sweep, disk = (
            sweep_memory(self.params.in_memory(model), *self._calibration),
            {"scales": 2 * 4 * model.kv_cache.layers * model.kv_cache.kv_heads},
        )
        if self.on_gpu(target):
            return Memory(ram={HIDDEN_STATES: sweep.pop(HIDDEN_STATES)}, vram=sweep, disk=disk)
        return Memory(ram=sweep, disk=disk)

    def work(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> Work:
        """Linked files are not read again, unless to count zeros. Those of a source folder are copied, but no spec tells which it is."""
        if calibration is None:
            return counting_zeros(model)
        samples, length = self._calibration
        sweep = self.params.products(forward_flops(model, samples * length, length, head=False))
        return sweep + reading(model) + tokenizing(calibration) + counting_zeros(model)

    def explain(self, model: ModelSpec, calibration: DatasetSpec | None = None) -> list[str]:
        before, after = model.kv_cache, model.with_cache(self.params.mode).kv_cache
        return [
            f"KV cache: {before.bytes_per_token:,} -> {after.bytes_per_token:,} bytes per token, where the server stores it as INT8",
            SERVED_BY[self.params.mode],
        ]

    def run(self, ctx: Context, model: C, calibration: Dataset | None = None) -> C:
        link_checkpoint(model.path, ctx.output, without=(CACHE_FILE, SCALES_FILE))
        write_cache(ctx.output, CacheSettings(mode=self.params.mode))
        if self.params.mode == "static":
            self._calibrate(ctx, model, calibration)
        return type(model)(path=ctx.output, spec=model.model_spec.with_cache(self.params.mode))

    def _calibrate(self, ctx: Context, model: Checkpoint, calibration: Dataset | None) -> None:
        """Apart from `run`, because these imports bring torch and transformers, which the other mode does without."""
        from stages.runtime.cache_scales import calibrate_scales, write_scales
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.text import calibration_windows, load_tokenizer

        assert calibration is not None, "infer has refused it"
        windows = calibration_windows(calibration, load_tokenizer(model.path), *self._calibration)
        device, dtype = resolve_device(self.execution.device), COMPUTE_DTYPES[self.params.computes_in]
        scales = calibrate_scales(model.path, windows, device, dtype, partial(ctx.progress, "calibrating"))
        write_scales(ctx.output, scales)
