"""A checkpoint as lm-evaluation-harness asks it: with the cache it is served with, and without computing anything twice.

The harness scores each continuation with its context in front. Here the choices of one question share one forward over their context,
whose keys and values the continuations then go on from; that is what makes multiple choice several times as fast. The output embedding
is applied to scored tokens only, in float32: the harness' own logits of a whole batch in bf16 make close answers ties.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache, LogitsProcessor

from stages.functional.losses import token_nll
from stages.runtime.scoring import load_served
from stages.runtime.text import load_tokenizer
from stages.runtime.windows import chunk_tokens

Progress = Callable[[str, int, int], None]  # label, done, total


@dataclass
class Continuation:
    """One request: `targets` are scored after the prefix of its group, of which `inputs` are given to the model beside the prefix."""

    number: int
    inputs: list[int]
    targets: list[int]


@dataclass
class Group:
    """Requests that begin with the same tokens."""

    prefix: list[int]
    members: list[Continuation] = field(default_factory=list)


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Refuses what a damaged model says, of which the most likely token could still be taken."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise ValueError("the model's logits are nan; its weights are damaged")
        return scores


class HarnessModel(HFLM):  # type: ignore[misc]  # lm_eval is not followed
    """`batch_size` requests at once. `cut` counts requests whose beginning did not fit into `max_length` tokens."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, batch_size: int, max_length: int, progress: Progress
    ) -> None:
        served = load_served(folder, device, dtype)
        super().__init__(
            pretrained=served.model, tokenizer=load_tokenizer(folder), backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.served, self.progress, self.cut = served, progress, 0
        self._label, self._done, self._total = "", 0, 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._start("scoring answers", len(requests))
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows that do not overlap but for one token of context."""
        owners, windows = [], []
        for owner, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, cut):
                owners.append(owner)
                windows.append((None, context, continuation))
        self._start("scoring texts", len(windows))
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            wanted = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise ValueError(
                    f"tasks: '{request.task_name}' generates up to {wanted} tokens, which leaves no room for a prompt in "
                    f"{self.max_length} tokens of context; lower its max_gen_toks"
                )
        self._start("generating", len(requests))
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, whether greedy decoding says the same) of each (_, context, continuation)."""
        found: dict[int, tuple[float, bool]] = {}
        for batch in batches(group_requests(self._fitted(requests)), int(self.batch_size)):
            for number, nll, greedy in self._score(batch):
                found[number] = (-nll, greedy)
            self._advance(sum(len(group.members) for group in batch))
        return [found[number] for number in range(len(requests))]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness', but where both together are no more tokens than the context: there it would leave nothing to score."""
        context_ids, ids = super()._encode_pair(context, continuation)
        if ids:
            return context_ids, ids
        whole = self.tok_encode(context + continuation)
        shared = next((n for n, (a, b) in enumerate(zip(context_ids, whole, strict=False)) if a != b), len(whole) - 1)
        return whole[:shared] or [self.prefix_token_id], whole[shared:]

    def _fitted(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts without what does not fit, from their beginning; the last token of a request is not read by the model."""
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1 or not continuation:
                raise ValueError(f"tasks: a continuation of {len(continuation)} tokens cannot be scored in {self.max_length} of context")
            self.cut += len(context) > room
            yield context[-room:], continuation

    def _score(self, batch: Sequence[Group]) -> Iterator[tuple[int, float, bool]]:
        """Of every request of the batch: its number, nats, whether each of its tokens is the model's first choice."""
        prefixes, cache = self._read([group.prefix for group in batch], shared=any(m.inputs for group in batch for m in group.members))
        members = [(row, member) for row, group in enumerate(batch) for member in group.members]
        tails = self._go_on(batch, members, cache) if cache is not None and any(member.inputs for _, member in members) else None
        states = []
        for n, (row, member) in enumerate(members):
            states.append(prefixes[row, prefixes.shape[1] - (len(member.targets) - len(member.inputs)) :])
            if tails is not None:
                states.append(tails[n, : len(member.inputs)])
        nll, first = self._losses(torch.cat(states), [token for _, member in members for token in member.targets])
        sizes = [len(member.targets) for _, member in members]
        for (_, member), losses, matches in zip(members, torch.split(nll, sizes), torch.split(first, sizes), strict=True):
            total = losses.double().sum().item()
            if total != total or total == float("inf"):
                raise ValueError("the model's log-probabilities are nan or infinite; its weights are damaged")
            yield member.number, total, bool(matches.all())

    def _read(self, rows: Sequence[Sequence[int]], shared: bool) -> tuple[torch.Tensor, Any]:
        """Hidden states [rows, longest, hidden_size] of rows padded on the left, and the cache that holds their keys and values.

        Without an INT8 cache, and where nothing goes on from the rows, there is none.
        """
        cache = self.served.cache
        if cache is not None:
            cache.reset()
        elif shared:
            cache = DynamicCache(config=self.model.config)
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return self._hidden(ids, mask, cache), cache

    def _go_on(self, batch: Sequence[Group], members: Sequence[tuple[int, Continuation]], cache: Any) -> torch.Tensor:
        """Hidden states [members, longest, hidden_size] of their inputs, padded on the right, after the prefix of each."""
        longest = max(len(member.inputs) for _, member in members)
        width = max(len(group.prefix) for group in batch)
        cache.batch_select_indices(torch.tensor([row for row, _ in members], device=self.device))
        ids = [member.inputs + [0] * (longest - len(member.inputs)) for _, member in members]
        mask = [[0] * (width - len(batch[row].prefix)) + [1] * (len(batch[row].prefix) + longest) for row, _ in members]
        return self._hidden(torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device), cache)

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        """ids [rows, new], mask [rows, past + new]: 0 for padding, which comes before a row's first token."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        states: torch.Tensor = self.model.get_decoder()(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return states

    def _losses(self, states: torch.Tensor, targets: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of hidden states [tokens, hidden_size]: nats [tokens] float32 and whether the target ranks first [tokens] bool, on the CPU."""
        wanted = torch.tensor(targets, device=states.device)
        nll, first = [], []
        for chunk in torch.split(torch.arange(len(wanted), device=states.device), chunk_tokens(self.model.config.vocab_size)):
            logits = self.served.logits(states[chunk])
            nll.append(token_nll(logits, wanted[chunk]))
            first.append(logits.argmax(-1) == wanted[chunk])
        return torch.cat(nll).cpu(), torch.cat(first).cpu()

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the harness', counting what is cut off."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.cut += int((mask.sum(-1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        if self.served.cache is not None:
            self.served.cache.reset()
            options["past_key_values"] = self.served.cache
        made: torch.Tensor = super()._model_generate(context, max_length, stop, logits_processor=[FiniteLogits()], **options)
        self._advance(len(context))
        return made

    def _start(self, label: str, total: int) -> None:
        self._label, self._done, self._total = label, 0, total

    def _advance(self, requests: int) -> None:
        self._done += requests
        self.progress(self._label, self._done, self._total)


def group_requests(requests: Iterator[tuple[list[int], list[int]]]) -> list[Group]:
    """(context, continuation) pairs grouped by context, those with the longest contexts first.

    A context that is alone takes its continuation into the prefix: one forward does.
    """
    groups: dict[tuple[int, ...], Group] = {}
    for number, (context, continuation) in enumerate(requests):
        group = groups.setdefault(tuple(context), Group(context))
        group.members.append(Continuation(number, continuation[:-1], continuation))
    for group in groups.values():
        if len(group.members) == 1:
            member = group.members[0]
            group.prefix, member.inputs = group.prefix + member.inputs, []
    return sorted(groups.values(), key=lambda group: -len(group.prefix))


def batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Groups of `batch_size` requests together at most; a group of more is cut."""
    batch: list[Group] = []
    held = 0
    for group in groups:
        for first in range(0, len(group.members), batch_size):
            part = Group(group.prefix, group.members[first : first + batch_size])
            if held + len(part.members) > batch_size:
                yield batch
                batch, held = [], 0
            batch.append(part)
            held += len(part.members)
    if batch:
        yield batch
