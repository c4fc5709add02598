"""How good a checkpoint is, alone and beside the model it was made from. Speed and memory are another stage's matter."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.artifact import Artifact, Checkpoint, Dataset, EvalReport, Export, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec
from pipeline.compute_dtype import Computing
from pipeline.headers import ITEM_BYTES
from pipeline.roofline import Work
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Stage
from pipeline.target import Memory, Target
from stages.runtime.layerwise_settings import LayerwiseExecution
from stages.runtime.peak_memory import freed_activations, layer_bytes, peak, resident_memory, widest
from stages.runtime.scheme import unpacking_memory
from stages.runtime.stage_work import TOKEN_BYTES, forward_flops, reading, tokenizing
from stages.runtime.windows import HIDDEN_STATES, LOGITS_BUFFERS, LOGITS_BUFFERS_ALONE, LOGITS_BYTES, batches, cut_windows

if TYPE_CHECKING:
    from stages.runtime.scoring import Scorer

METRICS = (
    "perplexity", "nll_per_token", "bits_per_byte", "kl_divergence", "kl_divergence_p99", "top1_agreement",
    "kv_cache_perplexity_change_pct", "kv_cache_kl_divergence",
)  # fmt: skip


class Evaluate(Stage):
    """Perplexity on held-out documents; against a reference also KL divergence and top-1 agreement, token by token.

    Transformers computes a checkpoint, llama.cpp an export (on the CPU, from the same token ids, which it must read in the text as
    well); a reference is always a checkpoint.

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

    `report.json`: {"metrics": {name: float}, "documents": [{"id", "bytes", "tokens" (scored), "nll" (sum, nats), "reference_nll",
    "kl" (sum, nats), "top1_matches" (count)}], "positions": [{"from", "to", "tokens", and as documents from there}]}; the last three
    are null without a reference. With an INT8 cache also "plain_cache_nll" and "plain_cache_kl" (sums, nats), of the ordinary cache.
    Documents stand in file order, so that two reports on one dataset can be paired. Positions are tokens before the scored one in its
    window, `from` <= position < `to`, in buckets 64 wide up to 512 and doubling from there on (512-1024, 1024-2048): an error that
    grows with context shows, which means over all tokens hide. Windows overlap by one token, and each counts from its own start.
    No metric is made of a bucket, since how many tokens it holds depends on how long the documents are.
    """

    name, version = "evaluate", 2
    libraries: tuple[str, ...] = ("torch", "transformers", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.mode": ("layerwise",), "execution.hidden_states": (1 << 30,)}

    class Params(Computing, Stage.Params):
        max_length: int = Field(default=512, ge=2)  # tokens of context; the model's max_position where that is less
        max_documents: int | None = Field(default=None, ge=1)

    class Execution(LayerwiseExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> None:
        if reference is not None and reference.architecture.vocab_size != model.architecture.vocab_size:
            raise ValueError(
                f"reference has {reference.architecture.vocab_size} tokens in its vocabulary, the model {model.architecture.vocab_size}; "
                "their distributions cannot be compared"
            )

    def measures(self) -> tuple[str, ...]:
        return METRICS

    def given(self, kinds: Mapping[str, type[Artifact]]) -> "Evaluate":
        runs_llama_cpp = issubclass(kinds.get("model", Checkpoint), Export)
        computing = type(self)(self.params, self.execution)
        computing.libraries = (*type(self).libraries, "llama-cpp-python") if runs_llama_cpp else type(self).libraries
        return computing

    def window(self, model: ModelSpec) -> int:
        return min(self.params.max_length, model.architecture.max_position)

    def memory(self, model: ModelSpec, eval: DatasetSpec, target: Target, reference: ModelSpec | None = None) -> Memory:
        """The models compute one after the other, and then their logits are compared. Resident models keep their blocks for that."""
        if model.is_gguf:
            return self._memory_beside_llama_cpp(model, eval, target, reference)
        in_memory = self.params.in_memory
        models = [("model", in_memory(model))] + ([("reference", in_memory(reference))] if reference else [])
        held, items = self._weights(models, eval, self.on_gpu(target))
        tokens, computing = self.execution.batch_size * self.window(model), [0]
        for name, spec in models:
            shape, item = spec.architecture, ITEM_BYTES[spec.dtype]
            computing.append(tokens * widest(shape) * item)
            if spec.kv_cache.mode:
                layers = shape.num_layers if self.execution.mode == "resident" else 1
                items[f"{name}, INT8 cache"] = tokens * spec.kv_cache.bytes_per_token * layers // shape.num_layers
                computing[-1] += 2 * tokens * shape.num_kv_heads * shape.head_dim * (item + 4)  # one layer's, dequantized by way of fp32
        activations = {"activations of one layer": max(computing)}
        buffers = LOGITS_BUFFERS if reference or model.kv_cache.mode else LOGITS_BUFFERS_ALONE
        logits = {"logits of a chunk of tokens": buffers * min(LOGITS_BYTES, 4 * tokens * model.architecture.vocab_size)}
        if self.execution.mode == "resident":
            items |= activations | logits
        else:
            layer = {"the largest decoder layer": max(layer_bytes(spec) for _, spec in models)}
            unpacking = {"a weight being unpacked": max(unpacking_memory(spec) for _, spec in models)}
            items["freed blocks that the allocator keeps"] = max(freed_activations(spec, tokens) for _, spec in models)
            items |= peak(layer | activations, layer | unpacking, logits)
        held["the dataset's text and token ids"] = 10 * eval.nbytes
        return Memory(ram=held, vram=items) if self.on_gpu(target) else Memory(ram=held | items)

    def _memory_beside_llama_cpp(self, model: ModelSpec, eval: DatasetSpec, target: Target, reference: ModelSpec | None) -> Memory:
        """The file is mapped, and read whole. A reference computes first, and its logits are compared chunk by chunk."""
        beside = self.memory(reference.with_cache(None), eval, target) if reference else Memory()
        ordinary = model.with_cache(None).kv_cache.bytes_per_token
        cache = ordinary + (model.kv_cache.bytes_per_token if model.kv_cache.mode else 0)
        logits = LOGITS_BUFFERS * min(LOGITS_BYTES, 4 * self.window(model) * model.architecture.vocab_size)
        items = {"the GGUF file, mapped": model.nbytes, "llama.cpp's KV cache": self.window(model) * cache, "logits": logits}
        return Memory(ram={f"reference: {name}": size for name, size in beside.ram.items()} | items, vram=beside.vram)

    def work(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> Work:
        """Documents are taken to be of one length, where only the first `max_documents` are read."""
        views = [model] * (2 if model.kv_cache.mode else 1) + ([reference] if reference else [])
        share = min(1.0, self.params.max_documents / eval.documents) if self.params.max_documents and eval.documents else 1.0
        tokens, work = share * eval.nbytes / TOKEN_BYTES, tokenizing(eval)
        for spec in views:
            work += self.params.products(forward_flops(spec, tokens, self.window(spec)))
        if self.execution.mode == "resident" or model.is_gguf:
            return work + reading(model) + (reading(reference) if reference else Work())
        token_bytes = len(views) * model.architecture.hidden_size * self.params.item
        sweeps = math.ceil(tokens * token_bytes / (self.execution.hidden_states or HIDDEN_STATES))
        for spec in views:
            work += reading(spec, sweeps)
        return work

    def _weights(self, models: Sequence[tuple[str, ModelSpec]], eval: DatasetSpec, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
        """What the models take, apart from their activations: always in RAM, and on the device that computes."""
        if self.execution.mode == "resident":
            parts = [resident_memory(name, spec, on_gpu) for name, spec in models]
            return {k: v for ram, _ in parts for k, v in ram.items()}, {k: v for _, device in parts for k, v in device.items()}
        items: dict[str, int] = {}
        views = [*models, *(("ordinary cache", spec) for name, spec in models if name == "model" and spec.kv_cache.mode)]
        states = 0
        for name, spec in views:  # each has the output embedding until its logits are computed
            row = spec.architecture.hidden_size * ITEM_BYTES[spec.dtype]
            items[f"{name}, output embedding"] = spec.architecture.vocab_size * row
            states += row * math.ceil(eval.nbytes / TOKEN_BYTES)
        return {"hidden states of the text in flight": min(self.execution.hidden_states or HIDDEN_STATES, states)}, items

    def explain(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> list[str]:
        said = []
        if self.window(model) != self.params.max_length:
            said.append(f"max_length {self.params.max_length}: windows are {self.window(model)} tokens, all the positions this model has")
        if model.kv_cache.mode:
            said.append(
                f"scored with its INT8 cache ({model.kv_cache.mode}), and once more with the ordinary one, to tell what the cache costs"
            )
        return said

    def run(self, ctx: Context, model: Checkpoint | Export, eval: Dataset, reference: Checkpoint | None = None) -> EvalReport:
        from stages.runtime.evaluation import Tally, cache_bytes, encode, write_report

        if reference is not None and tokenizer_digest(model.path) != tokenizer_digest(reference.path):
            raise ValueError("model and reference have different tokenizers; only models that read the same tokens can be compared")
        spec, execution = model.model_spec, self.execution
        documents = encode(eval, model.path, spec.architecture.vocab_size, self.params.max_documents)
        work = list(batches(cut_windows([document.ids for document in documents], self.window(spec)), execution.batch_size))
        scorer = self._scorer(model, eval, reference)
        tally = Tally(documents, self.window(spec), with_reference=reference is not None, with_cache=spec.kv_cache.mode is not None)
        for scores in scorer.scores(work, partial(ctx.progress, "scoring, layer by layer" if execution.mode == "layerwise" else "scoring")):
            tally.add(scores)
        metrics = tally.metrics() | {
            "nbytes": float(spec.nbytes),
            "bits_per_weight": spec.bits_per_weight,
            "kv_bytes_per_token": float(spec.kv_cache.bytes_per_token),
        }
        metrics |= {} if spec.kv_cache.mode is None else {"kv_cache_nbytes": cache_bytes(scorer.held, spec.kv_cache)}
        write_report(ctx.output, metrics, tally)
        return EvalReport(path=ctx.output, metrics=metrics)

    def _scorer(self, model: Checkpoint | Export, eval: Dataset, reference: Checkpoint | None) -> "Scorer":
        """What computes; apart from `run`, because llama.cpp is there only where an export was made."""
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.scoring import ResidentScorer
        from stages.runtime.swept import LayerwiseScorer

        device, hidden_states = resolve_device(self.execution.device), self.execution.hidden_states or HIDDEN_STATES
        dtype = COMPUTE_DTYPES[self.params.computes_in]
        if isinstance(model, Export):
            from stages.runtime.gguf_scoring import LlamaCppScorer, reference_view

            beside = reference_view(reference, device, dtype, self.execution.mode == "layerwise") if reference else None
            return LlamaCppScorer(model, self.window(model.model_spec), beside, hidden_states, eval, self.params.max_documents)
        folders = (model.path, reference.path if reference else None, device, dtype)
        return ResidentScorer(*folders) if self.execution.mode == "resident" else LayerwiseScorer(*folders, hidden_states)
