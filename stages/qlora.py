"""QLoRA: train low-rank adapters beside weights that are frozen in 4 bits, then merge them into the original weights.

The recovery after pruning (or the fine-tuning before quantizing) that needs a fraction of full training's memory: no gradient and no
optimizer state exists for the model's own weights.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pydantic import Field

from pipeline.artifact import Adapter, Dataset, DenseCheckpoint
from pipeline.artifact_spec import AdapterSpec, DatasetSpec
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.lora_settings import LoRATraining, adapter_spec, loading_memory, nf4_bytes
from stages.runtime.peak_memory import peak
from stages.runtime.sparsity_settings import ADAPTER_ALONE, MERGED_ZEROS, described, merge_cost, sparse_names
from stages.runtime.stage_work import LEARNED, digesting, merging, publishing, reading, scoring, tokenizing, training
from stages.runtime.training_settings import TrainingExecution, activation_memory


@dataclass(frozen=True)
class QLoRAOutputs:
    """The merged checkpoint, and the adapter alone for whoever serves the base with it."""

    model: DenseCheckpoint
    adapter: Adapter


@dataclass(frozen=True)
class QLoRASpecs:
    model: ModelSpec
    adapter: AdapterSpec


class QLoRA(Stage):
    """Train an adapter beside every decoder Linear layer on an NF4 base (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314).

    `train` is plain text, cut into windows, or conversations (`format: messages`), written by the model's own chat template. With
    `merge` the adapter is added to the original weights and the result is an ordinary dense checkpoint of the same shape.
    Metrics, of the adapter: `train_loss` (mean over the last tenth of the curve) and `first_train_loss` (first update), nats per
    counted token; `train_seconds` and `tokens_per_second` (padding counted), over all attempts of an interrupted run.

    With `lora_dropout` the elements dropped depend on the micro batch too, since they are drawn as it is computed.
    """

    name, version = "qlora", 1
    resumes = True
    reads_conversations = True
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    lightens = {"execution.gradient_checkpointing": (True,), "execution.micro_batch_size": HALVES, "max_length": HALVES}

    class Params(LoRATraining):
        learning_rate: float = Field(default=2e-4, gt=0)
        loss_on: Literal["assistant", "all"] | None = None  # of conversations; None: assistant
        double_quant: bool = True  # the blocks' maxima in 8 bits too: 0.37 bits a weight less
        merge: bool = True  # false: the adapter is the only output

    class Execution(TrainingExecution):
        pass

    params: Params
    execution: Execution

    def unmade(self) -> frozenset[str]:
        return frozenset() if self.params.merge else frozenset({"model"})

    def infer(self, model: ModelSpec, train: DatasetSpec) -> QLoRASpecs | AdapterSpec:
        if self.params.loss_on and train.format != "messages":
            raise ValueError(f"loss_on: {train.split} is plain text, where every token is learned; remove it or give format: messages")
        self.params.check_data(train, model)
        adapter = adapter_spec(model, self.params.rank)
        return QLoRASpecs(model=model, adapter=adapter) if self.params.merge else adapter

    def memory(self, model: ModelSpec, train: DatasetSpec, target: Target) -> Memory:
        adapter, on_gpu = adapter_spec(model, self.params.rank), self.on_gpu(target)
        held = {
            "NF4 base": nf4_bytes(model, self.params.double_quant, self.params.item),
            "adapter, its gradient and AdamW's moments": 4 * adapter.nbytes,
            **activation_memory(self.params, self.execution, model, on_gpu, self.params),
        }
        data = {"the dataset's text and token ids": 10 * train.nbytes}
        disk = {"adapter": adapter.nbytes, "two checkpoints of the training": 2 * 3 * adapter.nbytes}
        disk |= {"merged checkpoint": model.nbytes} if self.params.merge else {}
        if on_gpu:
            return Memory(vram=held, ram=data, disk=disk)
        return Memory(ram=peak(held, loading_memory(model, self.params.double_quant, self.params.item)) | data, disk=disk)

    def work(self, model: ModelSpec, train: DatasetSpec) -> Work:
        adapter = adapter_spec(model, self.params.rank).nbytes
        trained = training(self.params, self.execution, model, self.params) + tokenizing(train) + reading(model)
        trained += scoring(model, self.params.tokens, LEARNED)
        trained += Work(disk=adapter) + digesting(adapter)
        return trained + (merging(model) + publishing(model) if self.params.merge else Work())

    def explain(self, model: ModelSpec, train: DatasetSpec) -> list[str]:
        p, adapter = self.params, adapter_spec(model, self.params.rank)
        share = 100 * adapter.num_parameters / model.num_parameters
        said = f"trains {adapter.num_parameters:,} weights ({share:.2g} % of the model's) in {p.steps:,} updates on "
        zeros = []
        if model.sparsity:
            zeros = [f"zeros stay zero ({described(model)}): {MERGED_ZEROS}" if p.merge else f"zeros: {ADAPTER_ALONE}"]
        if train.format == "text":
            return [f"{said}{p.tokens:,} tokens", *zeros]
        parts = {"assistant": "what the assistant says", "all": "every token"}
        learned = parts[p.loss_on or "assistant"]
        return [f"{said}{p.num_samples * p.epochs:,} conversations of at most {p.max_length} tokens, learning {learned}", *zeros]

    def run(self, ctx: Context, model: DenseCheckpoint, train: Dataset) -> QLoRAOutputs:
        from stages.runtime.causal_loss import CausalLoss
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.lora import add_lora, load_nf4, merge_adapter, save_adapter
        from stages.runtime.samples import collate, training_samples
        from stages.runtime.training import train as fit

        p, work = self.params, ctx.output / "training"
        device = resolve_device(self.execution.device)
        samples = training_samples(ctx, model, train, p.num_samples, p.max_length, p.loss_on or "assistant")
        base = load_nf4(model.path, device, COMPUTE_DTYPES[p.computes_in], p.double_quant)
        adapted = add_lora(base, p.rank, p.lora_alpha, p.lora_dropout, p.seed)
        if self.execution.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        metrics = fit(ctx, CausalLoss(base), samples, collate, p, self.execution, work)
        ctx.note(f"training loss: {metrics['first_train_loss']:.3f} at the start, {metrics['train_loss']:.3f} at the end (nats per token)")

        place = ctx.output / "adapter" if p.merge else ctx.output
        save_adapter(adapted, place)
        del base, adapted
        if p.merge:
            sparse, progress = sparse_names(model.model_spec), partial(ctx.progress, "merging")
            lost = merge_adapter(model.path, place, ctx.output / "model", progress, sparse)
            if sparse:
                ctx.note(merge_cost(lost))
        if work.exists():
            shutil.rmtree(work)
        adapter = Adapter(place, adapter_spec(model.model_spec, p.rank), metrics=metrics)
        if not p.merge:
            return adapter  # type: ignore[return-value]  # one port is left, so it is the artifact itself
        return QLoRAOutputs(DenseCheckpoint(ctx.output / "model", model.model_spec), adapter)
