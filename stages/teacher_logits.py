"""What a teacher says of a text, scored once and kept, so that students can be distilled from it without the teacher."""

import math
from collections.abc import Callable
from functools import partial

from pydantic import Field

from pipeline.artifact import Checkpoint, Dataset, TeacherLogits, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec, LogitsSpec
from pipeline.compute_dtype import Computing
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target, format_size
from stages.runtime.layerwise_settings import LayerwiseExecution
from stages.runtime.logits_layout import LogitsFile
from stages.runtime.peak_memory import freed_activations, layer_bytes, peak, resident_memory, widest
from stages.runtime.scheme import unpacking_memory
from stages.runtime.stage_work import digesting, forward_flops, reading, tokenizing
from stages.runtime.training_settings import check_windows
from stages.runtime.windows import HIDDEN_STATES, LOGITS_BYTES, MICRO_BATCH_TOKENS, VOCABULARY_ROWS

LIST_BYTES = 12  # of a kept word while it is in memory: int64 id and float32 logit
CHUNK_BUFFERS = 3  # of one chunk's logits: in float32, divided by the temperature, exponentials


class RecordTeacher(Stage):
    """The `k` largest logits of the teacher at every token of the training text, and what all other words weigh together.

    Distillation needs little more: Hinton et al. (2015, https://arxiv.org/abs/1503.02531) match whole distributions, of which a few
    dozen words hold nearly all. The rest is kept as one number a token, the log-sum-exp of logits / `temperature` over the whole
    vocabulary, so that the distribution stays normalized: without it a student would learn that the rest has no probability.
    The logits are stored as the teacher computes them, in the dtype of the computation, unrounded. Layout: stages/runtime/logits_layout.py.

    Metrics: `tokens`; `kept_probability` (0 to 1), the teacher's probability at `temperature` that the kept words hold, mean over tokens.
    """

    name, version, resumes = "teacher_logits", 1, True
    libraries = ("torch", "transformers", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.mode": ("layerwise",), "execution.hidden_states": (1 << 30,)}

    class Params(Computing, Stage.Params):
        k: int = Field(default=32, ge=1)  # words kept at each token
        temperature: float = Field(default=2.0, gt=0, le=100)  # the one that distillation will use
        num_samples: int = Field(default=1024, ge=1)  # windows of text, evenly spaced over it ...
        max_length: int = Field(default=512, ge=2)  # ... and their tokens: both as in the stage that trains

    class Execution(LayerwiseExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, teacher: ModelSpec, train: DatasetSpec) -> LogitsSpec:
        words = teacher.architecture.vocab_size
        if self.params.k > words:
            raise ValueError(f"k: {self.params.k} is more than the {words} words of the teacher's vocabulary; write {words} or less")
        if train.format != "text":
            raise ValueError(f"train: {train.split} holds conversations, but logits are kept for windows of text; give a split of text")
        check_windows(self.params.num_samples, self.params.max_length, train, teacher)
        return self._layout(teacher, train.digest).spec

    def memory(self, teacher: ModelSpec, train: DatasetSpec, target: Target) -> Memory:
        layout = self._layout(teacher)
        teacher = self.params.in_memory(teacher)
        shape, item, length = teacher.architecture, self.params.item, self.params.max_length
        token_bytes = LIST_BYTES * self.params.k + 4
        at_once = min(self.params.num_samples, self._files_at_once(teacher) * layout.windows_per_file)
        ram = {
            "the text and its token ids": 10 * train.nbytes,
            "logits of the windows scored at once": 2 * at_once * length * token_bytes,
            "one file as it is written": 2 * min(layout.windows_per_file, self.params.num_samples) * layout.window_bytes,
        }
        tokens = min(self.execution.batch_size, self.params.num_samples) * length
        model = {"activations of one layer": tokens * widest(shape) * item}
        if self.execution.mode == "resident":
            loading, weights = resident_memory("teacher", teacher, self.on_gpu(target))
            ram, model = ram | loading, model | weights
            model["logits of a chunk of tokens"] = CHUNK_BUFFERS * min(LOGITS_BYTES, 4 * tokens * shape.vocab_size)
        else:
            ram["hidden states"] = min(self._at_once(teacher), self.params.num_samples) * length * shape.hidden_size * item
            model = {
                "freed blocks that the allocator keeps": freed_activations(teacher, tokens),
                "one decoder layer": layer_bytes(teacher),
                **peak(model, {"a weight being unpacked": unpacking_memory(teacher)}),
                "a slice of the output embedding": min(VOCABULARY_ROWS, shape.vocab_size) * shape.hidden_size * item,
                "logits of a slice": CHUNK_BUFFERS * 4 * MICRO_BATCH_TOKENS * min(VOCABULARY_ROWS, shape.vocab_size),
            }
        disk = {"logits": layout.spec.nbytes}
        if self.on_gpu(target):
            return Memory(ram=ram, vram=model, disk=disk)
        return Memory(ram=ram | model, disk=disk)

    def work(self, teacher: ModelSpec, train: DatasetSpec) -> Work:
        """The logits are written, read to tell what they hold of the probability, and digested."""
        p, logits = self.params, self._layout(teacher).spec.nbytes
        scoring = p.products(forward_flops(teacher, p.num_samples * p.max_length, p.max_length)) + Work(disk=2 * logits)
        sweeps = 1 if self.execution.mode == "resident" else self._sweeps(teacher)
        return scoring + reading(teacher, sweeps) + tokenizing(train) + digesting(logits)

    def explain(self, teacher: ModelSpec, train: DatasetSpec) -> list[str]:
        params, layout = self.params, self._layout(teacher)
        tokens = params.num_samples * params.max_length
        said = [f"keeps {params.k} of {layout.vocab_size:,} words at each of {tokens:,} tokens, {format_size(layout.spec.nbytes)}"]
        if self.execution.mode == "layerwise":
            sweeps = self._sweeps(teacher)
            times = f"{sweeps} times, fewer with more hidden_states" if sweeps > 1 else "once"
            said.append(f"mode layerwise: reads the teacher's {format_size(teacher.nbytes)} {times}")
        return said

    def run(self, ctx: Context, teacher: Checkpoint, train: Dataset) -> TeacherLogits:
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.samples import check_vocabulary
        from stages.runtime.teacher_logits import LayerwiseTeacher, ResidentTeacher, StoredLogits, Teacher, store_logits
        from stages.runtime.text import calibration_windows, load_tokenizer

        model, params = teacher.model_spec, self.params
        assert isinstance(train.spec, DatasetSpec), "a plan gives every dataset its spec"
        layout = self._layout(model, train.spec.digest, tokenizer_digest(teacher.path))
        windows = calibration_windows(train, load_tokenizer(teacher.path), params.num_samples, params.max_length)
        check_vocabulary(int(windows.max()), layout.vocab_size, "teacher")
        device, dtype = resolve_device(self.execution.device), COMPUTE_DTYPES[params.computes_in]
        settings = (teacher.path, device, dtype, self.execution.batch_size)
        load: Callable[[], Teacher] = partial(ResidentTeacher, *settings)
        if self.execution.mode == "layerwise":
            load = partial(LayerwiseTeacher, *settings, self._at_once(model))
        kept = store_logits(ctx, windows, layout, self._files_at_once(model), load)
        assert StoredLogits(ctx.output).nbytes == layout.spec.nbytes, "infer says how many bytes there are"
        metrics = {"tokens": float(windows.numel()), "kept_probability": kept}
        return TeacherLogits(path=ctx.output, spec=layout.spec, metrics=metrics)

    def _layout(self, teacher: ModelSpec, data: str = "", tokenizer: str | None = None) -> LogitsFile:
        params = self.params.model_dump(exclude={"compute_dtype"})
        words, dtype = teacher.architecture.vocab_size, self.params.in_memory(teacher).dtype
        return LogitsFile(**params, vocab_size=words, dtype=dtype, data=data, tokenizer=tokenizer)

    def _at_once(self, teacher: ModelSpec) -> int:
        """Layer by layer: windows whose hidden states, and the lists that follow from them, are in RAM together."""
        token_bytes = teacher.architecture.hidden_size * self.params.item + LIST_BYTES * self.params.k + 4
        return max(1, (self.execution.hidden_states or HIDDEN_STATES) // (self.params.max_length * token_bytes))

    def _files_at_once(self, teacher: ModelSpec) -> int:
        """Files whose windows are scored together: layer by layer, each time reads all of the teacher's weights."""
        return 1 if self.execution.mode == "resident" else max(1, self._at_once(teacher) // self._layout(teacher).windows_per_file)

    def _sweeps(self, teacher: ModelSpec) -> int:
        """How often a layerwise teacher's weights are read."""
        at_once, scored = self._at_once(teacher), self._files_at_once(teacher) * self._layout(teacher).windows_per_file
        whole, rest = divmod(self.params.num_samples, scored)
        return whole * math.ceil(scored / at_once) + math.ceil(rest / at_once)
