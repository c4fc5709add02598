"""What a checkpoint computes of a text, below its output embedding: kept, so that several evaluations need one forward pass."""

from functools import partial

from pydantic import Field

from pipeline.artifact import Checkpoint, Dataset, HiddenStates
from pipeline.artifact_spec import DatasetSpec, StatesSpec
from pipeline.compute_dtype import Computing
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.forwards import Forward, forward_memory, forward_work, row_bytes
from stages.runtime.layerwise_settings import LayerwiseExecution
from stages.runtime.peak_memory import peak
from stages.runtime.stage_work import digesting, scored_tokens, tokenizing
from stages.runtime.states_layout import StatesFile, states_spec
from stages.runtime.windows import HIDDEN_STATES, batches, cut_windows, scored


class StoreHiddenStates(Stage):
    """The model's final hidden states at every token from which another one is scored, as `evaluate` scores: the same windows, and the
    model as it is served, with its INT8 cache if it has one. In the dtype of the computation, unrounded, so that the logits that follow
    from them are those of the forward pass. Layout: stages/runtime/states_layout.py.

    Plans add it by themselves where several evaluations need the same pass (pipeline/shared_passes.py). A token of a model of 8,192
    dimensions takes 16 KB, where the forward pass of 70 B parameters computes 140 GFLOP, and read layer by layer loads 140 GB.

    Metrics: `tokens`.
    """

    name, version = "hidden_states", 1
    libraries = ("torch", "transformers", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.mode": ("layerwise",), "execution.hidden_states": (1 << 30,)}

    class Params(Computing, Stage.Params):
        max_length: int = Field(default=512, ge=2)  # as in evaluate: tokens of context, the model's max_position where that is less
        max_documents: int | None = Field(default=None, ge=1)

    class Execution(LayerwiseExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, eval: DatasetSpec) -> StatesSpec:
        return states_spec(self.params.in_memory(model), eval, self.params.max_documents)

    def window(self, model: ModelSpec) -> int:
        return min(self.params.max_length, model.architecture.max_position)

    def memory(self, model: ModelSpec, eval: DatasetSpec, target: Target) -> Memory:
        on_gpu = self.on_gpu(target)
        held, items, phases = forward_memory(
            [Forward("model", self.params.in_memory(model))], self.execution, self.window(model), eval, on_gpu
        )
        items |= peak(*phases)
        held["the dataset's text and token ids"] = 10 * eval.nbytes
        disk = {"hidden states": self.infer(model, eval).nbytes}
        return Memory(ram=held, vram=items, disk=disk) if on_gpu else Memory(ram=held | items, disk=disk)

    def work(self, model: ModelSpec, eval: DatasetSpec) -> Work:
        tokens = scored_tokens(eval, self.params.max_documents, model.architecture.vocab_size)
        computing = forward_work([Forward("model", model)], self.params, self.execution, tokens, self.window(model), head=False)
        written = tokens * row_bytes(self.params.in_memory(model))
        return tokenizing(eval) + computing + Work(disk=written) + digesting(written)

    def run(self, ctx: Context, model: Checkpoint, eval: Dataset) -> HiddenStates:
        from stages.runtime.evaluation import encode
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.scoring import load_served
        from stages.runtime.stored_states import StatesWriter
        from stages.runtime.swept import computed_batches, load_swept

        spec, execution, device = model.model_spec, self.execution, resolve_device(self.execution.device)
        documents = encode(eval, model.path, spec.architecture.vocab_size, self.params.max_documents)
        windows = cut_windows([document.ids for document in documents], self.window(spec))
        layout = StatesFile(tokens=scored(windows), hidden_size=spec.architecture.hidden_size, dtype=self.params.in_memory(spec).dtype)
        load = load_served if execution.mode == "resident" else load_swept
        view = load(model.path, device, COMPUTE_DTYPES[self.params.computes_in])
        work, progress = list(batches(windows, execution.batch_size)), partial(ctx.progress, "computing hidden states")
        with StatesWriter(ctx.output, layout) as writer:
            for batch in computed_batches(view, work, execution.hidden_states or HIDDEN_STATES, progress):
                writer.add(view.states(batch))
            writer.finish(view.held)
        return HiddenStates(path=ctx.output, metrics={"tokens": float(layout.tokens)})
