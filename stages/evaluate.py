"""How good a checkpoint is, alone and beside the model it was made from. Speed and memory are another stage's matter."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from pipeline.artifact import Checkpoint, Dataset, DatasetSpec, EvalReport, tokenizer_digest
from pipeline.headers import ITEM_BYTES
from pipeline.spec import ModelSpec
from pipeline.stage import Context, Stage
from pipeline.target import Memory, Size, Target
from stages.runtime.windows import HIDDEN_STATES, LOGITS_BUFFERS, LOGITS_BYTES, batches, cut_windows


class Evaluate(Stage):
    """Perplexity on held-out documents; against a reference also KL divergence and top-1 agreement, token by token.

    Every token but a document's first is scored once, in windows of `max_length` tokens (stages/runtime/windows.py).
    Metrics: `perplexity`, `nll_per_token` (nats), `bits_per_byte` (of the documents' UTF-8), `tokens` (scored), `documents`,
    `nbytes` (tensor data), `bits_per_weight`, `kv_bytes_per_token`; with a reference `reference_perplexity`,
    `perplexity_change_pct`, `kl_divergence` (mean over tokens of KL(reference || model), nats), `kl_divergence_p99`,
    `top1_agreement` (0 to 1).

    A checkpoint with a `kv_cache.json` is scored with the INT8 cache that it asks for (stages/runtime/int8_cache.py), the reference
    likewise. What the model's cache alone costs is measured against the same weights with the ordinary cache, in the model's dtype:
    `kv_cache_perplexity_change_pct`, `kv_cache_kl_divergence` (mean over tokens of KL(ordinary || INT8), nats), and `kv_cache_nbytes`,
    measured: what the cache holds for one window of the longest length. It must be what the spec promises for each token. In bf16 the
    divergence has a floor (about 2e-4 where `bench/kv_cache.py` measures it): any change makes later layers round differently.

    `report.json`: {"metrics": {name: float}, "documents": [{"id", "tokens" (scored), "bytes", "nll" (sum, nats),
    "reference_nll", "kl" (sum, nats), "top1_matches" (count)}]}; the last three are null without a reference. With an INT8 cache
    also "plain_cache_nll" and "plain_cache_kl" (sums, nats), of the ordinary cache. Documents stand in file order, so that two reports
    on one dataset can be paired.
    """

    name, version = "evaluate", 1
    libraries = ("torch", "transformers", "compressed-tensors")

    class Params(Stage.Params):
        max_length: int = Field(default=512, ge=2)  # tokens of context; the model's max_position where that is less
        max_documents: int | None = Field(default=None, ge=1)

    class Execution(Stage.Execution):
        mode: Literal["resident", "layerwise"] = "resident"  # layerwise: one layer in memory, for a model that does not fit
        batch_size: int = Field(default=8, ge=1)
        hidden_states: Size | None = Field(default=None, ge=1)  # layerwise: RAM for the text in flight; the default is 4GiB
        device: Literal["auto", "cpu", "cuda"] = "auto"

        @field_validator("hidden_states")
        @classmethod
        def _has_an_effect(cls, value: int | None, info: ValidationInfo) -> int | None:
            if value is not None and info.data.get("mode") == "resident":
                raise ValueError("it has an effect only with mode: layerwise; leave it out or write mode: layerwise")
            return value

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
        held, items = self._weights(models)
        for name, spec in models:
            shape, item = spec.architecture, ITEM_BYTES[spec.dtype]
            widest = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.num_heads * shape.head_dim
            tokens = self.execution.batch_size * self.window(spec)
            items[f"{name}, activations of one layer"] = tokens * widest * item
            if spec.kv_cache.mode:
                one_layer = 2 * tokens * shape.num_kv_heads * shape.head_dim
                layers = shape.num_layers if self.execution.mode == "resident" else 1
                items[f"{name}, INT8 cache"] = tokens * spec.kv_cache.bytes_per_token * layers // shape.num_layers
                items[f"{name}, keys and values of one layer, dequantized"] = one_layer * (item + 4)  # by way of fp32
        items["logits of a chunk of tokens"] = LOGITS_BUFFERS * LOGITS_BYTES
        held["the dataset's text and token ids"] = 10 * eval.nbytes
        return Memory(ram=held, vram=items) if self.on_gpu(target) else Memory(ram=held | items)

    def _weights(self, models: Sequence[tuple[str, ModelSpec]]) -> tuple[dict[str, int], dict[str, int]]:
        """What the models take, apart from their activations: always in RAM, and on the device that computes."""
        if self.execution.mode == "resident":
            items = {f"{name}, dense": spec.dense().nbytes for name, spec in models}
            return {}, items | {f"{name}, packed, while loading": spec.nbytes for name, spec in models if not spec.is_dense}
        items = {"the largest decoder layer": max(layer_bytes(spec) for _, spec in models)}
        heads = ((name, spec.architecture, ITEM_BYTES[spec.dtype]) for name, spec in models)
        items |= {f"{name}, output embedding": a.vocab_size * a.hidden_size * item for name, a, item in heads}
        return {"hidden states of the text in flight": self.execution.hidden_states or HIDDEN_STATES}, items

    def explain(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> list[str]:
        said = []
        if self.window(model) != self.params.max_length:
            said.append(f"max_length {self.params.max_length}: windows are {self.window(model)} tokens, all the positions this model has")
        if model.kv_cache.mode:
            said.append(
                f"scored with its INT8 cache ({model.kv_cache.mode}), and once more with the ordinary one, to tell what the cache costs"
            )
        return said

    def run(self, ctx: Context, model: Checkpoint, eval: Dataset, reference: Checkpoint | None = None) -> EvalReport:
        from stages.runtime.evaluation import Tally, cache_bytes, encode, write_report
        from stages.runtime.loading import resolve_device
        from stages.runtime.scoring import ResidentScorer
        from stages.runtime.swept import LayerwiseScorer

        if reference is not None and tokenizer_digest(model.path) != tokenizer_digest(reference.path):
            raise ValueError("model and reference have different tokenizers; only models that read the same tokens can be compared")
        spec, execution = model.model_spec, self.execution
        documents = encode(eval, model.path, spec.architecture.vocab_size, self.params.max_documents)
        work = list(batches(cut_windows([document.ids for document in documents], self.window(spec)), execution.batch_size))
        folders = (model.path, reference.path if reference else None, resolve_device(execution.device))
        resident = execution.mode == "resident"
        scorer = ResidentScorer(*folders) if resident else LayerwiseScorer(*folders, execution.hidden_states or HIDDEN_STATES)
        tally = Tally(documents, with_reference=reference is not None, with_cache=scorer.cache is not None)
        for scores in scorer.scores(work, partial(ctx.progress, "scoring" if resident else "scoring, layer by layer")):
            tally.add(scores)
        metrics = tally.metrics() | {
            "nbytes": float(spec.nbytes),
            "bits_per_weight": spec.bits_per_weight,
            "kv_bytes_per_token": float(spec.kv_cache.bytes_per_token),
        }
        metrics |= {} if scorer.cache is None else {"kv_cache_nbytes": cache_bytes(scorer.held, spec.kv_cache)}
        write_report(ctx.output, metrics, tally.rows())
        return EvalReport(path=ctx.output, metrics=metrics)


def layer_bytes(spec: ModelSpec) -> int:
    """Of one decoder layer's Linear weights, dense."""
    return ITEM_BYTES[spec.dtype] * sum(group.shape[0] * group.shape[1] for group in spec.dense().linear_groups if group.layers)
