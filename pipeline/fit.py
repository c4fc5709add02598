"""Does a model fit its target under load, and if not, which single change is the smallest that would make it?

Each of a target's GPUs holds its share of the weights and of the KV cache (tensor parallelism: KV heads are dealt out whole), and keeps
`Target.kept` for the engine. Every answer is computed from the spec with that one change made. Example: Llama 2 13B on a 24 GB
card, 2 sequences of 4,096 tokens:

    found = fit(spec, target, context=4096, batch=2, targets=others)
    found.fits                   # False: 26.0 GB of bf16 weights alone are more than the card has
    found.changes[0].setting     # 'num_bits', whose value is 8: next to nothing is given up
    print("\\n".join(found.sentences()))
    print(bits_sentence(spec, target, context=4096))    # how many such sequences 8 bits serve, and from where 4 are needed
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from pipeline.errors import InputProblems
from pipeline.headers import ITEM_BYTES
from pipeline.layout import Frozen, WeightFormat
from pipeline.spec import ModelSpec
from pipeline.target import Target, format_size

NUM_BITS = (8, 4, 3, 2)
NARROWEST_SERVED = 4  # bits: few servers have kernels for narrower weights, so that these are told of only where nothing else fits
GROUP_SIZE = 128  # of the groups that a change to `num_bits` would pack, where it divides every layer; and the grain of an MLP's width
DENSE = ("lm_head",)  # what quantization leaves alone, unless told otherwise
FREE_BITS = 8  # of weights and cache: what 16 bits hold beyond these is hardly ever measured in quality
MOST_PRUNED = 0.25  # of one axis: a deeper cut is another model, which much more than a short distillation must recover

Setting = Literal["num_bits", "kv_cache", "context", "batch", "intermediate_size", "num_kv_heads", "target"]


class Change(Frozen):
    """One setting that, changed alone, makes it fit. `share`, from 0 to 1, is how much of it is given up, by which changes are ranked.

    Of bits it counts those below 8. Of `target` it is by how much this one is smaller, or cheaper where that is more.
    """

    setting: Setting
    value: int | str
    share: float
    sentence: str


class Fit(Frozen):
    """Bytes on each of the target's `devices`, against the `room` that one has. What would fit instead is in `changes`, nearest first."""

    target: str
    devices: int
    context: int
    batch: int
    weights: int
    cache: int
    kept: int
    room: int
    longest_context: int  # at this batch, within what the model was made for; 0: not one token
    largest_batch: int  # at this context
    changes: tuple[Change, ...] = ()

    @property
    def needed(self) -> int:
        return self.weights + self.cache + self.kept

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    def sentences(self) -> list[str]:
        """The verdict with its sum; then how much more would fit, or what would have to change."""
        each = f"on each of {self.devices} GPUs: " if self.devices > 1 else ""
        verdict = (
            f"{self.batch} x {self.context:,} tokens {'fit' if self.fits else 'do not fit'} {self.target}: {each}"
            f"{format_size(self.weights)} of weights + {format_size(self.cache)} of KV cache "
            f"+ {format_size(self.kept)} kept for the engine = {format_size(self.needed)} of {format_size(self.room)}"
        )
        if self.fits:
            longest = f"the longest context at batch {self.batch} is {self.longest_context:,} tokens"
            return [verdict, f"{longest}, the largest batch at {self.context:,} tokens is {self.largest_batch}"]
        if not self.changes:
            return [verdict, "no single change of bits, KV cache, context, batch, size or target makes it fit"]
        lead = ["nearest change that fits: ", *["or: "] * (len(self.changes) - 1)]
        return [verdict, *(start + change.sentence for start, change in zip(lead, self.changes, strict=True))]


def fit(spec: ModelSpec, target: Target, context: int, batch: int, targets: Mapping[str, Target] | None = None) -> Fit:
    """Whether `batch` sequences of `context` tokens fit; `targets` are the machines to look for a larger one among.

    InputProblems where it cannot be told: the target's memory is not known, its GPUs cannot share the KV heads evenly, or the model
    was not made for that many positions.
    """
    problems = list(load_problems(spec, target, context))
    if problems:
        raise InputProblems(problems)
    found = _measure(spec, target, context, batch)
    if found.fits:
        return found
    changes = sorted(_changes(spec, target, found, targets or {}), key=lambda change: change.share)
    return found.model_copy(update={"changes": tuple(changes)})


def capacity(spec: ModelSpec, target: Target) -> int:
    """Tokens of KV cache, of all sequences together, that fit beside the weights; 0 where these do not. InputProblems as for `fit`."""
    problems = list(load_problems(spec, target, 1))
    if problems:
        raise InputProblems(problems)
    assert target.room is not None
    free = target.room - target.kept - math.ceil(spec.nbytes / target.devices)
    return max(0, free * target.devices // spec.kv_cache.bytes_per_token)


def bits_sentence(spec: ModelSpec, target: Target, context: int) -> str:
    """Up to which batch at that context each width of weights serves, widest first, and from where a narrower one is needed.

    The cache is stored as the spec says. InputProblems as for `fit`.
    """
    problems = list(load_problems(spec, target, context))
    if problems:
        raise InputProblems(problems)
    dense, served = spec.dense(), 0
    parts: list[str] = []
    for num_bits in (dense_bits(spec), *NUM_BITS):
        if num_bits < NARROWEST_SERVED and parts:
            break
        tokens = capacity(dense if num_bits > NUM_BITS[0] else requantized(dense, num_bits), target)
        if tokens // context > served:
            needed = f"from batch {served + 1} on {num_bits} bits are needed, which" if parts else f"{num_bits} bits"
            parts.append(f"{needed} leave room for {tokens:,} tokens of cache, {tokens // context} x {context:,}")
            served = tokens // context
    return f"{target.name}: " + ("; ".join(parts) or f"not one sequence of {context:,} tokens fits, at {NUM_BITS[-1]} bits either")


def dense_bits(spec: ModelSpec) -> int:
    """Of one weight of the dense model."""
    return 8 * ITEM_BYTES[spec.dtype]


def requantized(spec: ModelSpec, num_bits: int) -> ModelSpec:
    """The same model with its packed weights at `num_bits` at most.

    A dense one is packed symmetrically, in groups of 128 or of the largest power of two below it that divides every layer.
    """
    if spec.is_dense:
        group_size = math.gcd(GROUP_SIZE, *(group.shape[1] for group in spec.linear_groups))
        return spec.with_format(WeightFormat(num_bits=num_bits, group_size=group_size), DENSE)
    groups = []
    for group in spec.groups:
        if group.format.num_bits is not None:
            form = group.format.model_copy(update={"num_bits": min(num_bits, group.format.num_bits)})
            if num_bits < group.format.num_bits and form.layout != "pack-quantized":  # which know one width only
                group_size = math.gcd(GROUP_SIZE, group.shape[1])
                form = WeightFormat(num_bits=num_bits, group_size=group_size)
            group = group.model_copy(update={"format": form})
        groups.append(group)
    return spec.model_copy(update={"groups": tuple(groups)})


def load_problems(spec: ModelSpec, target: Target, context: int) -> Iterator[str]:
    """Why it cannot be told whether sequences of `context` tokens fit."""
    heads, limit = spec.kv_cache.kv_heads, spec.architecture.max_position
    if target.room is None and target.gpus:
        yield f"target.memory: the memory of a GPU of {target.name} is not known; write for example target.memory=80GiB"
    elif target.room is None:
        yield f"target.ram: {target.name} has no GPU and its RAM is not known; write for example target.ram=64GiB"
    if heads % target.devices:
        fitting = next(count for count in range(target.devices - 1, 0, -1) if heads % count == 0)
        yield f"target.gpus: {heads} KV heads cannot be dealt out evenly to {target.gpus} GPUs; write target.gpus={fitting}"
    if context > limit:
        yield f"serve.context: {context:,} tokens are more than the {limit:,} positions of the model; write serve.context={limit} or less"


def _measure(spec: ModelSpec, target: Target, context: int, batch: int) -> Fit:
    assert target.room is not None
    tokens = capacity(spec, target)
    return Fit(
        target=target.name,
        devices=target.devices,
        context=context,
        batch=batch,
        weights=math.ceil(spec.nbytes / target.devices),  # norms are on every GPU in full; below one part in ten thousand
        cache=spec.kv_cache.bytes_per_token * context * batch // target.devices,
        kept=target.kept,
        room=target.room,
        longest_context=min(tokens // batch, spec.architecture.max_position),
        largest_batch=tokens // context,
    )


def _changes(spec: ModelSpec, target: Target, found: Fit, targets: Mapping[str, Target]) -> Iterator[Change]:
    """Of every setting the smallest change that fits, where there is one."""

    def fits(changed: ModelSpec, machine: Target = target) -> bool:
        return _measure(changed, machine, found.context, found.batch).fits

    yield from _fewer_bits(spec, fits)
    cached = spec.with_cache("per_token_head")
    if spec.kv_cache.mode is None and fits(cached):
        old, new = spec.kv_cache.bytes_per_token, cached.kv_cache.bytes_per_token
        sentence = f"an INT8 KV cache (stage kv_cache): {old:,} -> {new:,} bytes per token"
        yield Change(setting="kv_cache", value="per_token_head", share=0, sentence=sentence)
    yield from _less("context", found.context, found.longest_context)
    yield from _less("batch", found.batch, found.largest_batch)
    if spec.architecture.experts is None:  # those are not pruned yet
        yield from _narrower(spec, target, fits)
        yield from _fewer_heads(spec, target, fits)
    larger = [
        (name, other)
        for name, other in targets.items()
        if other.gpus and other.memory and spec.kv_cache.kv_heads % other.gpus == 0 and fits(spec, other)
    ]
    if larger:
        name, other = min(larger, key=lambda pair: (pair[1].price or math.inf, _total(pair[1])))
        price = "" if other.price is None else f", ${other.price:.2f} per hour"
        sentence = f"target={name}: {other.gpus} x {format_size(other.memory or 0)}{price}"
        cheaper = 1 - target.price / other.price if target.price is not None and other.price else 0.0
        yield Change(setting="target", value=name, share=max(0.0, 1 - _total(target) / _total(other), cheaper), sentence=sentence)


def _total(target: Target) -> int:
    return target.devices * (target.room or 0)


def _fewer_bits(spec: ModelSpec, fits: Callable[[ModelSpec], bool]) -> Iterator[Change]:
    packed = [group.format.num_bits for group in spec.linear_groups if group.format.num_bits is not None]
    old = max(packed, default=dense_bits(spec))
    for num_bits in NUM_BITS:
        if num_bits < old and fits(changed := requantized(spec, num_bits)):
            sentence = f"num_bits={num_bits} for the linear layers: {format_size(spec.nbytes)} -> {format_size(changed.nbytes)} of weights"
            yield Change(setting="num_bits", value=num_bits, share=1 - num_bits / min(old, FREE_BITS), sentence=sentence)
            return


def _less(setting: Literal["context", "batch"], old: int, new: int) -> Iterator[Change]:
    if new:
        yield Change(setting=setting, value=new, share=1 - new / old, sentence=f"serve.{setting}={new} instead of {old}")


def _narrower(spec: ModelSpec, target: Target, fits: Callable[[ModelSpec], bool]) -> Iterator[Change]:
    """An MLP of fewer neurons."""
    width = spec.architecture.intermediate_size
    sizes = [group.format.group_size or 1 for group in spec.linear_groups]
    grain = target.devices * math.lcm(GROUP_SIZE, *sizes)
    widths = range(width // grain * grain, math.ceil(width * (1 - MOST_PRUNED)) - 1, -grain)
    found = _first(widths, lambda value: fits(_resized(spec, intermediate_size=value)))
    if found is not None:
        sentence = f"pruning the MLP to intermediate_size={found} of {width} ({1 - found / width:.1%} of it)"
        yield Change(setting="intermediate_size", value=found, share=1 - found / width, sentence=sentence)


def _fewer_heads(spec: ModelSpec, target: Target, fits: Callable[[ModelSpec], bool]) -> Iterator[Change]:
    """Fewer KV heads, each leaving with its query heads: the weights shrink, and so does the cache."""
    a = spec.architecture
    shared, fewest = a.num_heads // a.num_kv_heads, math.ceil(a.num_kv_heads * (1 - MOST_PRUNED))
    group_size = max(group.format.group_size or 1 for group in spec.linear_groups)
    counts = [
        count
        for count in range(a.num_kv_heads - 1, fewest - 1, -1)
        if count % target.devices == 0 and count * shared * a.head_dim % group_size == 0
    ]
    found = _first(counts, lambda value: fits(_resized(spec, num_kv_heads=value, num_heads=value * shared)))
    if found is not None:
        sentence = f"pruning the heads to num_kv_heads={found} of {a.num_kv_heads}, {found * shared} query heads"
        yield Change(setting="num_kv_heads", value=found, share=1 - found / a.num_kv_heads, sentence=sentence)


def _first(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first of falling sizes that fits; all after it do, too."""
    at = bisect_left(sizes, True, key=fits)
    return sizes[at] if at < len(sizes) else None


def _resized(spec: ModelSpec, **sizes: int) -> ModelSpec:
    """The same model with other sizes, its weights and cache stored as they are."""
    architecture = spec.architecture.model_copy(update=sizes)
    shapes = {group.name: group.shape for group in architecture.groups()}
    groups = tuple(group.model_copy(update={"shape": shapes.get(group.name, group.shape)}) for group in spec.groups)
    cache = spec.kv_cache.model_copy(update={"kv_heads": architecture.num_kv_heads})
    return spec.model_copy(update={"architecture": architecture, "groups": groups, "kv_cache": cache})
