"""How good a checkpoint is, alone and beside the model it was made from. Speed and memory are another stage's matter."""

from collections.abc import Mapping
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.artifact import Artifact, Checkpoint, Dataset, EvalReport, Export, HiddenStates, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec, StatesSpec
from pipeline.compute_dtype import Computing
from pipeline.headers import ITEM_BYTES
from pipeline.roofline import Work, table_size
from pipeline.spec import ModelSpec
from pipeline.stage import HALVES, Context, Pass, Stage
from pipeline.target import Memory, Target
from stages.runtime.forwards import Forward, forward_memory, forward_work, has_plain_head, head_bytes, row_bytes
from stages.runtime.layerwise_settings import LayerwiseExecution
from stages.runtime.peak_memory import peak
from stages.runtime.stage_work import COMPARED, SCORED, scored_tokens, scoring, tokenizing
from stages.runtime.windows import HIDDEN_STATES, LOGITS_BUFFERS, LOGITS_BUFFERS_ALONE, LOGITS_BYTES, batches, cut_windows, scored

if TYPE_CHECKING:
    from stages.runtime.scoring import Scorer, Stored

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
    `perplexity_change_pct` and the ends of its 95 % interval, `perplexity_change_pct_low` and `..._high` (a paired bootstrap over the
    documents; absent where there is one document), `kl_divergence` (mean over tokens of KL(reference || model), nats), `kl_divergence_p99`,
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

    name, version = "evaluate", 3
    libraries: tuple[str, ...] = ("torch", "transformers", "compressed-tensors")
    lightens = {"execution.batch_size": HALVES, "execution.mode": ("layerwise",), "execution.hidden_states": (1 << 30,)}

    class Params(Computing, Stage.Params):
        max_length: int = Field(default=512, ge=2)  # tokens of context; the model's max_position where that is less
        max_documents: int | None = Field(default=None, ge=1)

    class Execution(LayerwiseExecution):
        pass

    params: Params
    execution: Execution

    def infer(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None, **stored: StatesSpec) -> None:
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

    def passes(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> Mapping[str, Pass]:
        """Of checkpoints whose output embedding can be applied without the layers below it, on windows that fit into their positions."""
        params = self.params.model_dump() | {"max_length": self.window(model)}

        def stored(port: str, plain: bool = False) -> Pass:
            return Pass("hidden_states", params, self.execution.model_dump(), {"model": port, "eval": "eval"}, plain)

        found = {}
        if has_plain_head(model):
            found = {"states": stored("model")} | ({"plain_states": stored("model", plain=True)} if model.kv_cache.mode else {})
        if reference and has_plain_head(reference) and self.window(model) <= reference.architecture.max_position:
            found["reference_states"] = stored("reference")
        return found

    def memory(
        self, model: ModelSpec, eval: DatasetSpec, target: Target, reference: ModelSpec | None = None, **stored: StatesSpec
    ) -> Memory:
        """The models compute one after the other, and then their logits are compared. Resident models keep their blocks for that."""
        if model.is_gguf:
            return self._memory_beside_llama_cpp(model, eval, target, reference, stored)
        model = self.params.in_memory(model)
        reference = self.params.in_memory(reference) if reference else None
        on_gpu, tokens, resident = self.on_gpu(target), self.execution.batch_size * self.window(model), self.execution.mode == "resident"
        held, items, phases = forward_memory(forwards(model, reference, stored), self.execution, self.window(model), eval, on_gpu)
        for name, spec, port in (("model", model, "states"), ("reference", reference, "reference_states")):
            if spec is not None and (port in stored or not resident):
                items[f"{name}, output embedding"] = head_bytes(spec)
        rows = sum(spec.hidden_size * ITEM_BYTES[spec.dtype] for spec in stored.values())
        items |= {"stored hidden states of a batch": tokens * rows} if rows else {}
        buffers = LOGITS_BUFFERS if reference or model.kv_cache.mode else LOGITS_BUFFERS_ALONE
        logits = {"logits of a chunk of tokens": buffers * min(LOGITS_BYTES, 4 * tokens * model.architecture.vocab_size)}
        items |= reduce(or_, phases, logits) if resident else peak(*phases, logits)
        held["the dataset's text and token ids"] = 10 * eval.nbytes
        return Memory(ram=held, vram=items) if on_gpu else Memory(ram=held | items)

    def _memory_beside_llama_cpp(
        self, model: ModelSpec, eval: DatasetSpec, target: Target, reference: ModelSpec | None, stored: Mapping[str, StatesSpec]
    ) -> Memory:
        """The file is mapped, and read whole. A reference computes first, and its logits are compared chunk by chunk."""
        given: dict[str, Any] = {"states": stored["reference_states"]} if "reference_states" in stored else {}
        beside = self.memory(reference.with_cache(None), eval, target, **given) if reference else Memory()
        ordinary = model.with_cache(None).kv_cache.bytes_per_token
        cache = ordinary + (model.kv_cache.bytes_per_token if model.kv_cache.mode else 0)
        logits = LOGITS_BUFFERS * min(LOGITS_BYTES, 4 * self.window(model) * model.architecture.vocab_size)
        items = {"the GGUF file, mapped": model.nbytes, "llama.cpp's KV cache": self.window(model) * cache, "logits": logits}
        return Memory(ram={f"reference: {name}": size for name, size in beside.ram.items()} | items, vram=beside.vram)

    def work(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None, **stored: StatesSpec) -> Work:
        """What is stored is read, and multiplied with the output embedding."""
        tokens, work = scored_tokens(eval, self.params.max_documents, model.architecture.vocab_size), tokenizing(eval)
        views = forwards(model, reference, stored)
        for execution, by_llama_cpp in ((LayerwiseExecution(), True), (self.execution, False)):  # a GGUF file is read once
            computed = [view for view in views if view.spec.is_gguf == by_llama_cpp]
            work += forward_work(computed, self.params, execution, tokens, self.window(model))
        for spec in [reference if port == "reference_states" else model for port in stored]:
            assert spec is not None, "what is stored of a reference comes with one"
            states = tokens * row_bytes(self.params.in_memory(spec))
            work += self.params.products(2 * tokens * table_size(spec)) + Work(disk=states + head_bytes(spec))
        others = bool(reference) + bool(model.kv_cache.mode)
        return work + scoring(model, tokens, SCORED + others * COMPARED)

    def explain(self, model: ModelSpec, eval: DatasetSpec, reference: ModelSpec | None = None) -> list[str]:
        said = []
        if self.window(model) != self.params.max_length:
            said.append(f"max_length {self.params.max_length}: windows are {self.window(model)} tokens, all the positions this model has")
        if model.kv_cache.mode:
            said.append(
                f"scored with its INT8 cache ({model.kv_cache.mode}), and once more with the ordinary one, to tell what the cache costs"
            )
        return said

    def run(
        self,
        ctx: Context,
        model: Checkpoint | Export,
        eval: Dataset,
        reference: Checkpoint | None = None,
        states: HiddenStates | None = None,
        reference_states: HiddenStates | None = None,
        plain_states: HiddenStates | None = None,
    ) -> EvalReport:
        """`states`, `reference_states` and `plain_states` (of the model without its INT8 cache) take the place of forward passes."""
        from stages.runtime.evaluation import Tally, cache_bytes, encode, write_report
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.scoring import Stored
        from stages.runtime.stored_states import StoredStates, StoredView

        if reference is not None and tokenizer_digest(model.path) != tokenizer_digest(reference.path):
            raise ValueError("model and reference have different tokenizers; only models that read the same tokens can be compared")
        spec, execution, device = model.model_spec, self.execution, resolve_device(self.execution.device)
        documents = encode(eval, model.path, spec.architecture.vocab_size, self.params.max_documents)
        windows = cut_windows([document.ids for document in documents], self.window(spec))
        work, tokens = list(batches(windows, execution.batch_size)), scored(windows)
        dtype = COMPUTE_DTYPES[self.params.computes_in]
        stored = Stored(
            StoredView(states.path, tokens, model.path, device, dtype) if states else None,
            StoredView(reference_states.path, tokens, reference.path, device, dtype) if reference_states and reference else None,
            StoredStates(plain_states.path, tokens, device) if plain_states else None,
        )
        scorer = self._scorer(model, eval, reference, stored)
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

    def _scorer(self, model: Checkpoint | Export, eval: Dataset, reference: Checkpoint | None, stored: "Stored") -> "Scorer":
        """What computes; apart from `run`, because llama.cpp is there only where an export was made."""
        from stages.runtime.loading import COMPUTE_DTYPES, resolve_device
        from stages.runtime.scoring import ResidentScorer
        from stages.runtime.swept import LayerwiseScorer

        device, hidden_states = resolve_device(self.execution.device), self.execution.hidden_states or HIDDEN_STATES
        dtype = COMPUTE_DTYPES[self.params.computes_in]
        if isinstance(model, Export):
            from stages.runtime.gguf_scoring import LlamaCppScorer, reference_view

            computed = reference if stored.reference is None else None
            beside = reference_view(computed, device, dtype, self.execution.mode == "layerwise") if computed else stored.reference
            return LlamaCppScorer(model, self.window(model.model_spec), beside, hidden_states, eval, self.params.max_documents)
        folders = (model.path, reference.path if reference else None, device, dtype)
        if self.execution.mode == "resident":
            return ResidentScorer(*folders, stored)
        return LayerwiseScorer(*folders, hidden_states, stored)


def forwards(model: ModelSpec, reference: ModelSpec | None, stored: Mapping[str, StatesSpec]) -> list[Forward]:
    """What computes: the views that are not `stored`. A model without its INT8 cache has the weights that are there for it with it."""
    views = [] if "states" in stored else [Forward("model", model)]
    if model.kv_cache.mode and "plain_states" not in stored:
        views.append(Forward("model, ordinary cache", model.with_cache(None), loads="states" in stored))
    if reference is not None and "reference_states" not in stored:
        views.append(Forward("reference", reference))
    return views
