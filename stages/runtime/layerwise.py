"""Run a decoder-only model one layer at a time, straight from its checkpoint folder.

Only one decoder layer is ever in memory, beside the hidden states of the text that is carried through it: `sweep` takes
all micro-batches through layer 0, then through layer 1, and so on. The embedding and the head are read in slices of the
vocabulary. A 70B model so needs the memory of its largest layer, not of its 140 GB.

On an accelerator (`device`) a layer's weights and one micro-batch are there at a time; the hidden states of all of them stay in the
host's RAM, where there is more of it.

Nothing of a model family is rebuilt here. The model itself is made on the `meta` device, without weights, and its own
forward says what each layer is called with (masks, rotary embeddings, sliding windows): it runs once with layers that
only record. So the logits equal those of the resident model exactly, which the tests hold for every supported family.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.spec import ModelSpec
from stages.functional.top_logits import TopLogits, join, top_logits
from stages.runtime.rounded_inputs import round_inputs
from stages.runtime.tensors import DTYPES, TensorReader
from stages.runtime.vocabulary import EMBEDDING, Vocabulary, unpacked
from stages.runtime.windows import MICRO_BATCH_TOKENS

OnLayer = Callable[[int, torch.nn.Module], Iterable[RemovableHandle]]
OnOutput = Callable[[int, int, torch.Tensor, torch.Tensor], None]
Revise = Callable[[int, torch.nn.Module], None]


class TokenScores(NamedTuple):
    """Of one micro-batch [B, T], in fp32."""

    nll: torch.Tensor  # [B, T - 1]: -log p(token t + 1 | tokens up to t), in nats
    logsumexp: torch.Tensor  # [B, T]: of the logits over the vocabulary; log p = logit - logsumexp


def micro_batches(windows: torch.Tensor, tokens: int = MICRO_BATCH_TOKENS) -> list[torch.Tensor]:
    """[N, T] token ids in pieces of at most `tokens` tokens, at least one window each."""
    rows = max(1, tokens // windows.shape[1])
    return [windows[first : first + rows] for first in range(0, len(windows), rows)]


def token_pieces(hidden: Sequence[torch.Tensor], tokens: int = MICRO_BATCH_TOKENS) -> list[torch.Tensor]:
    """Views [at most `tokens`, H] of hidden states [B, T, H], in order."""
    return [piece for states in hidden for piece in torch.split(states.flatten(0, 1), tokens)]


class LayerwiseModel:
    """A checkpoint that can be run without being loaded. `dtype` is that of the computation (default: the checkpoint's).

    What is given and returned (token ids, masks, hidden states, scores) is on the CPU; hooks see tensors on `device`. Layers share
    their buffers: a tensor of a layer's weights is valid until the next layer is loaded. Packed layers are dequantized as they
    are loaded. Where their format rounds what its weights are multiplied with, they do that too; LLM.int8() layers stay as they are stored.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.spec = ModelSpec.from_config(raw)
        self.reader = TensorReader(folder)
        problems = self.spec.differences(self.reader.table)
        if problems:
            raise ValueError(f"{folder} is not the model its config.json describes: {'; '.join(problems[:5])}")
        self.dtype = dtype or DTYPES[self.spec.dtype]
        self.device = torch.device(device)
        self.decoder = meta_decoder(folder, self.dtype, self.device)
        self.layers = self.decoder.layers
        self.vocabulary = Vocabulary(self.reader, self.spec, self.dtype)
        self._formats = self.vocabulary.formats
        head = self._formats.get(self.vocabulary.head.removesuffix(".weight"))
        if head is not None and head.rounds_inputs:
            raise ValueError(f"{folder} rounds the inputs of its head ({head.layout}), which is read in slices here; write mode: resident")
        round_inputs(self.decoder, self._formats)
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def sweep(
        self,
        batches: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None = None,
        on_layer: OnLayer | None = None,
        on_output: OnOutput | None = None,
        cache: Any | None = None,
        revise: Revise | None = None,
    ) -> list[torch.Tensor]:
        """Carry micro-batches of token ids [B, T] through all layers; returns the hidden states [B, T, H] that the head takes.

        `masks` are attention masks [B, T] (1: attend), None where a batch has no padding. `on_layer(i, layer)` is called
        when layer i is loaded and may register hooks, whose handles it returns; `on_output(i, b, before, after)` sees
        batch b's hidden states around layer i, and clones what it keeps. `cache` is a KV cache of the model (transformers' `Cache`)
        whose layers attention reads through: each holds one batch at a time, which `on_output` still finds there.

        `revise(i, layer)` may change the weights of layer i in place, once every batch has been through it and its hooks are gone; the
        batches then go through it once more, so that the next layer sees what the changed one computes.
        """
        masks = masks or [None] * len(batches)
        hidden = self.embed(batches)
        recorded: dict[torch.Size, list[dict[str, Any]]] = {}  # unmasked batches of one shape are called alike

        def forward(i: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
            before, mask = hidden[b].to(self.device), masks[b]
            if mask is not None:
                arguments = self.layer_arguments(before, mask.to(self.device))
            elif (arguments := recorded.get(before.shape, [])) == []:
                arguments = recorded[before.shape] = self.layer_arguments(before)
            return before, self.layers[i](before, **arguments[i] | ({"past_key_values": cache} if cache else {}))

        for i in range(len(self.layers)):
            layer = self.load_layer(i)
            handles = list(on_layer(i, layer)) if on_layer else []
            if revise:
                for b in range(len(masks)):
                    forward(i, b)
                while handles:
                    handles.pop().remove()
                revise(i, layer)
            for b in range(len(masks)):
                before, after = forward(i, b)
                if on_output:
                    on_output(i, b, before, after)
                if cache:
                    cache.layers[i].reset()
                hidden[b].copy_(after)  # in place: new ones among a layer's temporary tensors would fragment the heap, layer by layer
            for handle in handles:
                handle.remove()
            layer.to("meta")
        self._buffers.clear()
        self.normalize(hidden)
        return hidden

    @torch.no_grad()
    def normalize(self, hidden: Sequence[torch.Tensor]) -> None:
        """Hidden states as the last layer leaves them, in place, to what the head takes."""
        self._load(self.decoder.norm, "model.norm.")
        for h in hidden:
            h.copy_(self.decoder.norm(h.to(self.device)))
        self.decoder.norm.to("meta")

    def embed(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[B, T] token ids to [B, T, H] embeddings."""
        hidden = [torch.empty(*ids.shape, self.spec.architecture.hidden_size, dtype=self.dtype) for ids in batches]
        for first, weight in self.vocabulary.slices(EMBEDDING):
            for ids, h in zip(batches, hidden, strict=True):
                here = (ids >= first) & (ids < first + len(weight))
                h[here] = weight[ids[here] - first]
        return hidden

    def load_layer(self, index: int) -> torch.nn.Module:
        """Decoder layer `index` with its weights; `.to("meta")` lets go of them."""
        return self._load(self.layers[index], f"model.layers.{index}.")

    def layer_arguments(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> list[dict[str, Any]]:
        """The keyword arguments that the model's own forward passes to each of its layers for these hidden states."""
        calls: list[dict[str, Any]] = []

        def record(states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            calls.append(arguments)
            return states

        inert = [*self.layers, self.decoder.norm]
        for module in inert:
            module.forward = record
        try:
            # use_cache: a cache would keep the keys and values of every layer
            self.decoder(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
        finally:
            for module in inert:
                del module.forward
        return calls[:-1]

    def output_embedding(self) -> torch.Tensor:
        """[vocabulary, H], whole, on `device`."""
        return self.vocabulary.output_embedding(self.device)

    @torch.no_grad()
    def logit_slices(self, hidden: Sequence[torch.Tensor]) -> Iterator[tuple[int, Iterator[torch.Tensor]]]:
        """Yield (first, logits) by slices of the vocabulary: of each of `hidden` [..., H] in turn [..., rows] in fp32 on `device`.

        The slice's words are those from `first` on.
        """
        for first, rows in self.vocabulary.slices(self.vocabulary.head):
            weight = rows.to(self.device)
            yield first, (functional.linear(h.to(self.device), weight).float() for h in hidden)

    @torch.no_grad()
    def score(self, hidden: Sequence[torch.Tensor], batches: Sequence[torch.Tensor]) -> list[TokenScores]:
        """Score the token ids `batches` by the hidden states that `sweep` made of them, never holding [B, T, vocabulary]."""
        log_sums = [torch.full(ids.shape, -torch.inf) for ids in batches]
        targets = [torch.zeros(ids[:, 1:].shape) for ids in batches]
        for first, slices in self.logit_slices(hidden):
            for ids, log_sum, target, logits in zip(batches, log_sums, targets, slices, strict=True):
                torch.logaddexp(log_sum, logits.logsumexp(-1).cpu(), out=log_sum)
                wanted = ids[:, 1:] - first
                here = (wanted >= 0) & (wanted < logits.shape[-1])
                word = wanted.clamp(0, logits.shape[-1] - 1).unsqueeze(-1).to(self.device)
                chosen = logits[:, :-1].gather(-1, word).squeeze(-1).cpu()
                target[here] = chosen[here]
        return [TokenScores(log_sum[:, :-1] - target, log_sum) for log_sum, target in zip(log_sums, targets, strict=True)]

    @torch.no_grad()
    def top_logits(self, hidden: Sequence[torch.Tensor], k: int, temperature: float) -> list[TopLogits]:
        """The k largest logits at each token of `hidden` [..., H], as `sweep` made them, never holding [tokens, vocabulary].

        Logits of a slice are held for one of `hidden` at a time, so give them in pieces (`token_pieces`).
        """
        found: list[TopLogits] = []
        for first, slices in self.logit_slices(hidden):
            parts = (top_logits(logits, k, temperature, first).cpu() for logits in slices)
            found = [join(top, part, k) for top, part in zip(found, parts, strict=True)] if found else list(parts)
        return found

    def _load(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        module.load_state_dict({name: self._weight(prefix, name) for name in module.state_dict()}, assign=True)
        return module

    def _weight(self, prefix: str, name: str) -> torch.Tensor:
        """One weight of a layer, in the dtype of the computation, read into the buffer that the next layer will use again."""
        module = (prefix + name).removesuffix(".weight")
        form = self._formats.get(module.removesuffix(".SCB"))
        as_stored = form is not None and form.layout == "llm_int8"
        if form is not None and not as_stored:
            return unpacked(self.reader, module, form, self.spec, self.dtype).to(self.device)
        buffer = f"{name} {self.reader.entry(prefix + name).dtype}"  # layers may differ in which of their weights are quantized
        self._buffers[buffer] = self.reader.read(prefix + name, out=self._buffers.get(buffer))
        return self._buffers[buffer].to(self.device, None if as_stored else self.dtype)


def meta_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's model below its head, without weights but with what is computed and not stored, which is on `device`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its layers come dequantized
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False).get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)  # inverse frequencies are in no file
    return decoder
