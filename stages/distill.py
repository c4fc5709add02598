"""Distillation: train a student to predict what a teacher predicts, to recover what pruning took from it."""

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.artifact import Checkpoint, Dataset, DenseCheckpoint, TeacherLogits
from pipeline.artifact_spec import DatasetSpec, LogitsSpec
from pipeline.errors import InputProblems
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Lighter, Stage
from pipeline.target import Memory, Target
from stages.runtime.launch import ALONE, launch, read_config
from stages.runtime.lora_settings import adapter_spec, check_rank, loading_memory, nf4_bytes
from stages.runtime.peak_memory import peak
from stages.runtime.sparsity_settings import MERGED_ZEROS, described, sparse_names
from stages.runtime.stage_work import (
    DISTILLED,
    LEARNED,
    flowing,
    forward_flops,
    merging,
    micro_batches,
    publishing,
    reading,
    scoring,
    tokenizing,
    training,
    unpacking_nf4,
)
from stages.runtime.training_settings import LoRAParams, TrainingExecution, TrainingParams, activation_memory

STATE_BYTES = 16  # of a trained weight: itself, its gradient and AdamW's two moments, each fp32 ...
CHECKPOINT_BYTES = 12  # ... all of which but the gradient are saved


class Distill(Stage):
    """Match the teacher's next-token distribution at every token of a text (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

        loss = alpha * T^2 * KL(teacher || student, both at temperature T) + (1 - alpha) * cross-entropy of the text

    averaged over tokens. The teacher is a checkpoint, packed or not, or its stored logits (stage `teacher_logits`), where the words
    that were not kept count as one outcome. `method: full` trains every weight in float32; `lora` trains adapters beside the
    student frozen in NF4 and merges them into its original weights. Logits exist for a chunk of tokens at a time.

    Metrics: `train_loss` (mean over the last tenth of the curve) and `first_train_loss` (first update), of the loss above;
    `train_seconds` and `tokens_per_second`, over all attempts of an interrupted run. Trains on one device; with
    `execution.accelerate_config`, `method: full` trains on several, each with a copy of the student or, by FSDP, a part of it, and
    with a teacher of its own: of a teacher too large for that, store the logits.
    """

    name, version = "distill", 1
    resumes = True
    libraries: tuple[str, ...] = ("torch", "transformers", "compressed-tensors")
    lightens = {
        "execution.gradient_checkpointing": (True,),
        "execution.micro_batch_size": HALVES,
        "teacher_precision": ("nf4",),
        "method": ("lora",),
        "max_length": HALVES,
    }

    class Params(TrainingParams):
        temperature: float = Field(default=2.0, gt=0, le=100)  # above 1 the teacher's small probabilities count for more
        alpha: float = Field(default=0.7, ge=0, le=1)  # weight of the teacher; the rest is the text's
        learning_rate: float = Field(default=1e-4, gt=0)
        method: Literal["full", "lora"] = "full"
        lora: LoRAParams | None = None  # for method lora; None: its defaults
        teacher_precision: Literal["dense", "nf4"] = "dense"  # dense: in the dtype of the computation; NF4 takes a quarter of bf16's memory

        @field_validator("teacher_precision", mode="before")
        @classmethod
        def _dense_was_bf16(cls, precision: Any) -> Any:
            if precision == "bf16":
                raise ValueError("a dense teacher computes as the student does; write dense, and compute_dtype: bf16 for both")
            return precision

        @property
        def adapter(self) -> LoRAParams:
            return self.lora or LoRAParams()

    class Execution(TrainingExecution):
        accelerate_config: str | None = None  # file that `accelerate config` writes, for several GPUs; the micro batch is each one's

    params: Params
    execution: Execution

    def __init__(self, params: Any = None, execution: Any = None) -> None:
        super().__init__(params, execution)
        if self.params.method == "lora" or self.params.teacher_precision == "nf4":
            self.libraries = (*self.libraries, "peft", "bitsandbytes")

    def unused(self) -> frozenset[str]:
        return frozenset() if self.params.alpha else frozenset({"teacher"})

    def infer(self, student: ModelSpec, train: DatasetSpec, teacher: ModelSpec | LogitsSpec | None = None) -> ModelSpec:
        problems = without_effect(self.params, teacher) + process_problems(self.params, self.execution.accelerate_config)
        if train.format != "text":
            problems.append(f"inputs.train: {train.split} holds conversations, distill learns from text; give a split of plain text")
        if self.params.alpha and teacher is None:
            problems.append("inputs.teacher: alpha is not 0, so there must be one; write inputs: {teacher: model} or alpha: 0")
        if isinstance(teacher, ModelSpec):
            problems += teacher_problems(self.params, student, teacher)
        elif isinstance(teacher, LogitsSpec):
            problems += logits_problems(self.params, student, train, teacher)
        if problems:
            raise InputProblems(problems)
        self.params.check_data(train, student)
        if self.params.method == "lora":
            try:
                check_rank(student, self.params.adapter.rank)
            except ValueError as error:
                raise ValueError(f"lora.{error}") from None
        return student

    def memory(self, student: ModelSpec, train: DatasetSpec, target: Target, teacher: ModelSpec | LogitsSpec | None = None) -> Memory:
        p, shape, adapts = self.params, student.architecture, self.params.method == "lora"
        trained = adapter_spec(student, p.adapter.rank).num_parameters if adapts else student.num_parameters
        on_gpu = self.on_gpu(target)
        processes = read_config(self.execution.accelerate_config) if self.execution.accelerate_config else ALONE
        held = {  # by each process
            "student, frozen in NF4": nf4_bytes(student, double_quant=True, item=p.item) if adapts else 0,
            "trained weights, their gradients and AdamW's moments": STATE_BYTES * trained // processes.shards,
            "weights gathered for their layer": gathered_bytes(student) if processes.sharded else 0,
        }
        passing = {  # made in the forward, gone at the end of the backward
            "copy of the weights in bf16": 0 if adapts or p.computes_in == "fp32" or processes.sharded else 2 * student.num_parameters,
            "gradient of the output embedding": 0 if adapts else (4 + 2) * shape.vocab_size * shape.hidden_size,  # and a chunk's part of it
            **activation_memory(p, self.execution, student, on_gpu, p.adapter if adapts else None),
        }
        if not adapts and p.global_batch_size <= self.execution.micro_batch_size * processes.count:
            passing = beside_gradients(passing, 4 * trained // processes.shards)
        held |= passing
        guide = {}
        if isinstance(teacher, ModelSpec):
            guide["teacher"] = nf4_bytes(teacher, True, p.item) if p.teacher_precision == "nf4" else p.item * teacher.num_parameters
            if p.teacher_precision == "dense" and not teacher.is_dense:
                guide["teacher as it is stored, while loading"] = teacher.nbytes
        if adapts and not on_gpu:
            held = peak(held, loading_memory(student, double_quant=True, item=p.item))
        held = {name: count for name, count in (held | guide).items() if count}
        data = {"the dataset's text and token ids": 10 * train.nbytes}
        disk = {"checkpoint": student.nbytes, "state of the training, twice while it is replaced": 2 * CHECKPOINT_BYTES * trained}
        if on_gpu:
            if processes.sharded:
                data["student in each process, until it is split"] = 4 * student.num_parameters * processes.count
            return Memory(vram=held, ram=data, disk=disk)
        return Memory(ram={name: count * processes.count for name, count in (held | data).items()}, disk=disk)

    def work(self, student: ModelSpec, train: DatasetSpec, teacher: ModelSpec | LogitsSpec | None = None) -> Work:
        """Of each process, with a GPU of its own; what they read is read once."""
        p, adapts = self.params, self.params.method == "lora"
        processes = read_config(self.execution.accelerate_config) if self.execution.accelerate_config else ALONE
        work = training(p, self.execution, student, p.adapter if adapts else None, processes)
        work += tokenizing(train) + reading(student) + (merging(student) if adapts else Work()) + publishing(student)
        if isinstance(teacher, ModelSpec):
            packed = unpacking_nf4(p, teacher, 1) * micro_batches(p, self.execution, processes.count)
            scored = forward_flops(teacher, p.tokens / processes.count, p.max_length)
            work += reading(teacher) + p.products(scored) + Work(nbytes=packed if p.teacher_precision == "nf4" else 0)
            work += flowing(teacher, p.tokens / processes.count, p.max_length)
        elif teacher is not None:
            work += Work(disk=p.epochs * teacher.nbytes)
        return work + scoring(student, p.tokens / processes.count, LEARNED if teacher is None else DISTILLED)

    def lighter(self, student: ModelSpec, train: DatasetSpec, teacher: ModelSpec | LogitsSpec | None = None) -> Iterator[Lighter]:
        """Also the teacher's logits in place of a teacher that is loaded."""
        specs = {"student": student, "train": train, "teacher": teacher}
        if isinstance(teacher, ModelSpec):
            p, shape = self.params, teacher.architecture
            stored = LogitsSpec(vocab_size=shape.vocab_size, k=32, temperature=p.temperature, num_samples=p.num_samples,
                                max_length=p.max_length, data=train.digest, nbytes=0)  # fmt: skip
            yield "inputs.teacher=<a teacher_logits stage with execution.mode: layerwise>", self, specs | {"teacher": stored}
        yield from super().lighter(**specs)

    def explain(self, student: ModelSpec, train: DatasetSpec, teacher: ModelSpec | LogitsSpec | None = None) -> list[str]:
        p = self.params
        said = [f"{p.steps:,} updates on {p.tokens:,} tokens, {p.global_batch_size * p.max_length:,} in each"]
        if isinstance(teacher, LogitsSpec) and p.alpha:
            said.append(f"teacher: its {teacher.k} largest logits of {teacher.vocab_size:,}; all other words count as one outcome")
        if p.alpha == 0:
            said.append("alpha 0: no teacher, ordinary training on the text (cross-entropy)")
        if p.alpha == 1:
            said.append("alpha 1: only the teacher is learned from, not which word the text goes on with")
        if p.method == "lora":
            count = adapter_spec(student, p.adapter.rank).num_parameters
            said.append(f"method lora: trains {count:,} weights beside the student in NF4, then merges them into its original weights")
        if student.sparsity:
            kept = MERGED_ZEROS if p.method == "lora" else "only the other weights are trained"
            said.append(f"zeros stay zero ({described(student)}): {kept}")
        return said

    def run(
        self, ctx: Context, student: DenseCheckpoint, train: Dataset, teacher: Checkpoint | TeacherLogits | None = None
    ) -> DenseCheckpoint:
        if self.execution.accelerate_config:
            inputs = {"student": student, "train": train, "teacher": teacher}
            metrics = launch(ctx, self, self.execution.accelerate_config, inputs, ctx.output / "processes")
            return DenseCheckpoint(ctx.output, student.model_spec, metrics=metrics)
        from stages.runtime.distillation import DistillationLoss, full_trainee, load_teacher, lora_trainee, numbered, stack
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.processes import process_index
        from stages.runtime.samples import window_samples
        from stages.runtime.text import calibration_windows, load_tokenizer
        from stages.runtime.training import train as fit

        p, work, device = self.params, ctx.output / "training", resolve_device(self.execution.device)
        dtype = COMPUTE_DTYPES[p.computes_in]
        guide, windows = load_teacher(teacher, student, p.teacher_precision, device, dtype) if teacher else (None, None)
        tokenizer = load_tokenizer(student.path)
        if windows is None:
            windows = calibration_windows(train, tokenizer, p.num_samples, p.max_length)
        samples = numbered(window_samples(windows, tokenizer, student.model_spec.architecture.vocab_size))
        progress = partial(ctx.progress, "writing")
        if p.method == "full":
            trainee = full_trainee(student, device, progress)
        else:
            trainee = lora_trainee(student, device, dtype, p.adapter, p.seed, work, progress, ctx.note)
        if self.execution.gradient_checkpointing:
            trainee.model.gradient_checkpointing_enable({"use_reentrant": False})
        module = DistillationLoss(trainee.model, guide, p.temperature, p.alpha)
        sparse = {f"student.{name}" for name in sparse_names(student.model_spec)}
        metrics = fit(ctx, module, samples, stack, p, self.execution, work, sparse)
        ctx.note(f"training loss: {metrics['first_train_loss']:.3f} at the start, {metrics['train_loss']:.3f} at the end")
        trainee.write(ctx.output)
        if process_index() == 0 and work.exists():
            shutil.rmtree(work)
        return DenseCheckpoint(ctx.output, student.model_spec, metrics=metrics)


def process_problems(p: Distill.Params, accelerate_config: str | None) -> list[str]:
    """Why several processes cannot train this together."""
    if accelerate_config is None:
        return []
    if p.method == "lora":
        return ["execution.accelerate_config: adapters are trained on one device; leave it out or write method: full"]
    try:
        count = read_config(accelerate_config).count
    except ValueError as error:
        return [str(error)]
    samples = p.num_samples * p.epochs
    if p.global_batch_size % count or samples % count:
        return [
            f"execution.accelerate_config: {count} processes cannot share {samples:,} samples, {p.global_batch_size} in an update, "
            f"equally; write a global_batch_size and num_samples that {count} divides, or fewer processes"
        ]
    return []


def beside_gradients(passing: dict[str, int], gradients: int) -> dict[str, int]:
    """What of `passing` counts where an update has one micro batch: its backward makes the gradients in the place of what it uses up,
    layer by layer, so that the larger of the two is there and not both."""
    return {"what a micro batch takes, beyond the gradients that replace it": max(0, sum(passing.values()) - gradients)}


def gathered_bytes(model: ModelSpec) -> int:
    """Of sharded weights, what every process has whole at once: embeddings, and two layers with one's gradients; at most float32."""
    embeddings = 2 * model.architecture.vocab_size * model.architecture.hidden_size
    return 4 * (embeddings + 3 * model.num_parameters // model.architecture.num_layers)


def without_effect(p: Distill.Params, teacher: ModelSpec | LogitsSpec | None) -> list[str]:
    """Settings that change nothing, a sentence each."""
    changed = p.model_dump(exclude_defaults=True)
    problems = []
    if p.method == "full" and p.lora is not None:
        problems.append("lora: it has an effect only with method: lora; leave it out or write method: lora")
    if p.alpha == 0:
        problems += [
            f"{name}: it has no effect with alpha 0, where there is no teacher; leave it out"
            for name in ("temperature", "teacher_precision")
            if name in changed
        ]
    elif isinstance(teacher, LogitsSpec) and p.teacher_precision == "nf4":
        problems.append("teacher_precision: the teacher's logits are stored, no teacher is loaded; leave it out here")
    return problems


def teacher_problems(p: Distill.Params, student: ModelSpec, teacher: ModelSpec) -> list[str]:
    """Why that teacher cannot guide that student."""
    mine, its, problems = student.architecture, teacher.architecture, []
    if mine.vocab_size != its.vocab_size:
        problems.append(
            f"inputs.teacher: it has {its.vocab_size:,} words in its vocabulary, the student {mine.vocab_size:,}; "
            "distillation compares distributions over the same words, choose a teacher of the student's family"
        )
    if its.max_position < p.max_length:
        problems.append(
            f"max_length: {p.max_length} is more than the teacher's {its.max_position} positions; write {its.max_position} or less"
        )
    if p.teacher_precision == "nf4" and not teacher.is_dense:
        problems.append("teacher_precision: nf4 packs dense weights, and this teacher is packed already; leave it out")
    return problems


def logits_problems(p: Distill.Params, student: ModelSpec, train: DatasetSpec, logits: LogitsSpec) -> list[str]:
    """Why those logits are not of what this stage trains on."""
    same = {"temperature": p.temperature, "num_samples": p.num_samples, "max_length": p.max_length}
    problems = [
        f"{name}: the teacher's logits were stored with {getattr(logits, name):g}, here it is {mine:g}; write the same in both stages"
        for name, mine in same.items()
        if getattr(logits, name) != mine
    ]
    if logits.vocab_size != student.architecture.vocab_size:
        problems.append(
            f"inputs.teacher: its logits are over {logits.vocab_size:,} words, the student has {student.architecture.vocab_size:,}; "
            "choose a teacher of the student's family"
        )
    if logits.data != train.digest:
        problems.append("inputs.train: the teacher's logits are of another text; give both stages the same split")
    return problems
