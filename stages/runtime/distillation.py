"""What a distillation trains: the student and its loss in one module, the teacher beside it.

The teacher is no submodule: wrappers for several devices must not shard it, and `train()` must not reach it. It sees the very windows
that the student sees, or its logits of them were stored before.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.artifact import Checkpoint, DenseCheckpoint, TeacherLogits, tokenizer_digest
from stages.functional.distillation import CrossEntropy, Distillation, Divergence, FullTeacher, Objective, TopTeacher, linear_loss
from stages.runtime.loading import load_model
from stages.runtime.processes import is_sharded, process_index, wait_for_everyone, whole
from stages.runtime.samples import NOT_COUNTED, Sample, Samples
from stages.runtime.scoring import hidden_states
from stages.runtime.sparsity_settings import merge_cost, sparse_names
from stages.runtime.teacher_logits import StoredLogits
from stages.runtime.tensors import DTYPES, CheckpointWriter, copy_companions
from stages.runtime.training_settings import LoRAParams, loss_chunk_tokens

Progress = Callable[[int, int], None]


class Teacher(Protocol):
    def divergence(self, input_ids: torch.Tensor, windows: torch.Tensor, counted: torch.Tensor) -> Divergence:
        """Of the counted tokens: input_ids and counted [samples, length], windows [samples] their numbers."""
        ...


@dataclass(frozen=True)
class ResidentTeacher:
    """A transformers model in eval mode, whose weights are in the dtype of the computation."""

    model: Any

    def divergence(self, input_ids: torch.Tensor, windows: torch.Tensor, counted: torch.Tensor) -> Divergence:
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            return FullTeacher(hidden_states(self.model, input_ids)[counted], self.model.get_output_embeddings())


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher's largest logits, read window by window."""

    logits: StoredLogits

    def divergence(self, input_ids: torch.Tensor, windows: torch.Tensor, counted: torch.Tensor) -> Divergence:
        return TopTeacher(*(tensor.to(input_ids.device)[counted] for tensor in self.logits.batch(windows.tolist())))


class DistillationLoss(torch.nn.Module):
    """A student with its loss, summed over counted tokens; cross-entropy alone where there is no teacher."""

    def __init__(self, student: Any, teacher: Teacher | None, temperature: float, alpha: float) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.temperature, self.alpha = temperature, alpha
        self._no_split_modules = student._no_split_modules  # which modules FSDP gathers one at a time

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, window: torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids and labels [samples, length], window [samples]: which window of the text each sample is."""
        counted = labels != NOT_COUNTED
        objective: Objective = CrossEntropy(labels[counted])
        if self.teacher is not None:
            divergence = self.teacher.divergence(input_ids, window, counted)
            objective = Distillation(labels[counted], divergence, self.temperature, self.alpha)
        hidden, head = hidden_states(self.student, input_ids)[counted], self.student.get_output_embeddings().weight
        return linear_loss(hidden, head, objective, loss_chunk_tokens(len(head)))


def load_teacher(
    teacher: Checkpoint | TeacherLogits, student: Checkpoint, precision: str, device: torch.device, dtype: torch.dtype
) -> tuple[Teacher, torch.Tensor | None]:
    """The teacher, which computes in `dtype`, and the windows that it was asked about before, [samples, length], if it was.

    ValueError where it reads other tokens than the student: only distributions over the same words can be compared.
    """
    stored = StoredLogits(teacher.path) if isinstance(teacher, TeacherLogits) else None
    tokenizer = stored.layout.tokenizer if stored else tokenizer_digest(teacher.path)
    if tokenizer != tokenizer_digest(student.path):
        raise ValueError("inputs.teacher: it has another tokenizer than the student; choose a teacher that reads the same tokens")
    if stored is not None:
        return StoredTeacher(stored), stored.windows
    if precision == "nf4":
        from stages.runtime.lora import load_nf4  # here: of peft and bitsandbytes a full distillation needs neither

        return ResidentTeacher(load_nf4(teacher.path, device, dtype)), None
    return ResidentTeacher(load_model(teacher.path, device, dtype=dtype).requires_grad_(False)), None


@dataclass(frozen=True)
class Trainee:
    """A student on its device, those of its weights requiring a gradient that are to be trained; `write` its checkpoint into a folder."""

    model: Any
    write: Callable[[Path], None]


def full_trainee(student: DenseCheckpoint, device: torch.device, progress: Progress) -> Trainee:
    """Every weight in float32; written back as the student has them."""
    model, tensors = load_model(student.path, "cpu" if is_sharded() else device).float(), student.model_spec.tensors()
    if is_sharded():  # layer by layer they come to the device; there embeddings are 16 bits wide, and what is added to them is not
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, states: states.float())

    def values() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (dtype, _) in tensors.items():
            yield name, whole(model.get_parameter(name).detach()).to("cpu", DTYPES[dtype])

    def write(output: Path) -> None:
        if process_index() == 0:
            with CheckpointWriter(output, tensors) as writer:
                for done, (name, value) in enumerate(values(), 1):
                    writer.add(name, value)
                    progress(done, len(tensors))
            copy_companions(student.path, output, student.config)
        else:
            deque(values(), maxlen=0)  # its part of each tensor is needed
        wait_for_everyone()

    return Trainee(model, write)


def lora_trainee(
    student: DenseCheckpoint,
    device: torch.device,
    compute_dtype: torch.dtype,
    lora: LoRAParams,
    seed: int,
    work: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> Trainee:
    """Adapters beside the student frozen in NF4; merged into its original weights, by way of a folder in `work`. `note` is told what
    the student's zeros cost the adapters."""
    from stages.runtime.lora import add_lora, load_nf4, merge_adapter, save_adapter  # here, as in `load_teacher`

    base = load_nf4(student.path, device, compute_dtype)
    adapted = add_lora(base, lora.rank, lora.lora_alpha, lora.lora_dropout, seed)

    def write(output: Path) -> None:
        save_adapter(adapted, work / "adapter")
        lost = merge_adapter(student.path, work / "adapter", output, progress, sparse_names(student.model_spec))
        if student.model_spec.sparsity:
            note(merge_cost(lost))

    return Trainee(base, write)


def numbered(samples: Samples) -> Samples:
    """Each with its number, by which a stored teacher finds what it said of it."""
    return Samples([sample | {"window": torch.tensor(number)} for number, sample in enumerate(samples.samples)])


def stack(samples: Sequence[Sample]) -> Sample:
    """A batch of windows, which all have one length."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
