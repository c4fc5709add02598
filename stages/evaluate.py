"""How good a checkpoint is, alone and beside the model it was made from. Speed and memory are another stage's matter."""

from typing import Literal

from pydantic import Field

from pipeline.artifact import Checkpoint, Dataset, DatasetSpec, EvalReport, tokenizer_digest
from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.windows import LOGITS_BUFFERS, LOGITS_BYTES, batches, cut_windows


class Evaluate(Stage):
    """Perplexity on held-out documents; against a reference also KL divergence and top-1 agreement, token by token.

    Every token but a document's first is scored once, in windows of `max_length` tokens (stages/runtime/windows.py).
    Metrics: `perplexity`, `nll_per_token` (nats), `bits_per_byte` (of the documents' UTF-8), `tokens` (scored), `documents`,
    `nbytes` (tensor data), `bits_per_weight`, `kv_bytes_per_token`; with a reference `reference_perplexity`,
    `perplexity_change_pct`, `kl_divergence` (mean over tokens of KL(reference || model), nats), `kl_divergence_p99`,
    `top1_agreement` (0 to 1).

    `report.json`: {"metrics": {name: float}, "documents": [{"id", "tokens" (scored), "bytes", "nll" (sum, nats),
    "reference_nll", "kl" (sum, nats), "top1_matches" (count)}]}; the last three are null without a reference. Documents stand
    in file order, so that two reports on one dataset can be paired.
    """

    name, version = "evaluate", 1
    libraries = ("torch", "transformers", "compressed-tensors")

    class Params(Stage.Params):
        max_length: int = Field(default=512, ge=2)  # tokens of context; the model's max_position where that is less
        max_documents: int | None = Field(default=None, ge=1)

    class Execution(Stage.Execution):
        batch_size: int = Field(default=8, ge=1)
        device: Literal["auto", "cpu", "cuda"] = "auto"

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> None:
        if reference is not None and reference.architecture.vocab_size != model.architecture.vocab_size:
            raise ValueError(
                f"reference has {reference.architecture.vocab_size} tokens in its vocabulary, the model {model.architecture.vocab_size}; "
                "their distributions cannot be compared"
            )

    def window(self, model: ModelSpec) -> int:
        return min(self.params.max_length, model.architecture.max_position)

    def memory(self, model: ModelSpec, eval: DatasetSpec, target: Target, reference: ModelSpec | None = None) -> Memory:
        models = [("model", model)] + ([("reference", reference)] if reference else [])
        items = {f"{name}, dense": spec.dense().nbytes for name, spec in models}
        items |= {f"{name}, packed, while loading": spec.nbytes for name, spec in models if not spec.is_dense}
        for name, spec in models:
            shape, item = spec.architecture, ITEM_BYTES[spec.dtype]
            widest = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.num_heads * shape.head_dim
            items[f"{name}, activations of one layer"] = self.execution.batch_size * self.window(spec) * widest * item
        items["logits of a chunk of tokens"] = LOGITS_BUFFERS * LOGITS_BYTES
        items["the dataset's text and token ids"] = 10 * eval.nbytes
        on_gpu = target.gpus > 0 and self.execution.device != "cpu"
        return Memory(vram=items) if on_gpu else Memory(ram=items)

    def explain(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> list[str]:
        if self.window(model) == self.params.max_length:
            return []
        return [f"max_length {self.params.max_length}: windows are {self.window(model)} tokens, all the positions this model has"]

    def run(self, ctx: Context, model: Checkpoint, eval: Dataset, reference: Checkpoint | None = None) -> EvalReport:
        from stages.runtime.evaluation import Tally, encode, write_report
        from stages.runtime.loading import load_model, resolve_device
        from stages.runtime.scoring import score_batch

        if reference is not None and tokenizer_digest(model.path) != tokenizer_digest(reference.path):
            raise ValueError("model and reference have different tokenizers; only models that read the same tokens can be compared")
        spec = model.model_spec
        documents = encode(eval, model.path, spec.architecture.vocab_size, self.params.max_documents)
        windows = cut_windows([document.ids for document in documents], self.window(spec))
        device = resolve_device(self.execution.device)
        scored = load_model(model.path, device)
        beside = load_model(reference.path, device) if reference is not None else None
        tally = Tally(documents, with_reference=reference is not None)
        for done, batch in enumerate(batches(windows, self.execution.batch_size), 1):
            tally.add(score_batch(batch, scored, beside))
            ctx.progress("scoring", done, -(-len(windows) // self.execution.batch_size))
        metrics = tally.metrics() | {
            "nbytes": float(spec.nbytes),
            "bits_per_weight": spec.bits_per_weight,
            "kv_bytes_per_token": float(spec.kv_cache.bytes_per_token),
        }
        write_report(ctx.output, metrics, tally.rows())
        return EvalReport(path=ctx.output, metrics=metrics)
