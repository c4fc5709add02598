"""Shapes to bytes, in closed form: what a model is before any weight of it is read.

A `ModelSpec` is a tuple of module groups (name pattern, layers, shape, `WeightFormat`) plus the layout of its KV cache,
all of it derived from the dozen integers of an `Architecture`. It predicts the exact tensor table of the checkpoint on
disk: names, dtypes, shapes, hence bytes. Example: a 14336 x 4096 linear layer packed at 4 bits with symmetric groups of 128 is
14336 * 512 int32 words (29,360,128 B) + 14336 * 32 bf16 scales (917,504 B) + its shape (16 B) = 30,277,648 B.
"""

import fnmatch
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pipeline.architecture import Architecture
from pipeline.ggml import BLOCKS, tensor_bytes
from pipeline.headers import ITEM_BYTES, TensorEntry
from pipeline.layout import BlockCache, CacheMode, DType, Frozen, KVCacheSpec, ModuleGroup, Sparsity, WeightFormat
from pipeline.stored_format import LINEAR, stored_formats

STATE = ".quant_state.bitsandbytes__"
IGNORABLE = ("*rotary_emb.inv_freq",)  # left in files by old savers; recomputed by every reader


class ModelSpec(Frozen):
    """A model as its checkpoint will stand on disk. Build it with `of` or `from_config`, change it with `with_format`."""

    architecture: Architecture
    groups: tuple[ModuleGroup, ...]
    kv_cache: KVCacheSpec
    sparsity: Sparsity | None = None  # None: nothing is known of zeros among the weights

    @classmethod
    def of(cls, architecture: Architecture) -> "ModelSpec":
        """The dense model of that architecture, with a 16-bit cache."""
        cache = KVCacheSpec(layers=architecture.num_layers, kv_heads=architecture.num_kv_heads, head_dim=architecture.head_dim)
        return cls(architecture=architecture, groups=tuple(architecture.groups()), kv_cache=cache)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """From a `config.json`, its `quantization_config` included. ValueError where it cannot be."""
        spec = cls.of(Architecture.from_config(config))
        quantization = config.get("quantization_config")
        if quantization is None:
            return spec
        stored, ignore = stored_formats(quantization)
        if stored[0][0] == LINEAR:
            return spec.with_format(stored[0][1], ignore)
        names = [name for group in spec.linear_groups for name in group.module_names if not ignored(name, ignore)]
        found = {name: next((form for targets, form in stored if ignored(name, targets)), None) for name in names}
        return spec.with_formats({name: form for name, form in found.items() if form})

    @property
    def dtype(self) -> DType:
        return self.architecture.dtype

    @property
    def is_dense(self) -> bool:
        return all(group.format.is_dense for group in self.groups)

    @property
    def is_gguf(self) -> bool:
        """Whether it stands in a GGUF file, where every group has one of llama.cpp's types."""
        return any(group.format.ggml is not None for group in self.groups)

    @property
    def sparse_groups(self) -> tuple[ModuleGroup, ...]:
        """Those that `sparsity` speaks of: the Linear layers of the decoder layers. A head stays dense."""
        return tuple(group for group in self.linear_groups if group.layers)

    @property
    def linear_groups(self) -> tuple[ModuleGroup, ...]:
        return tuple(group for group in self.groups if group.kind == "linear")

    def with_format(self, form: WeightFormat, ignore: tuple[str, ...] = ()) -> "ModelSpec":
        """Every Linear layer not named in `ignore` (exact, or `re:` pattern matched from the start) stored as `form`.

        ValueError names each layer whose input width the group size does not divide, and a size that would.
        """
        groups: list[ModuleGroup] = []
        misfits: list[str] = []
        for group in self.groups:
            if group.kind != "linear":
                groups.append(group)
                continue
            chosen, rest = _split(group, ignore)
            if chosen and form.group_size and group.shape[1] % form.group_size:
                misfits.append(f"{group.pattern} ({group.shape[1]})")
            groups += [part.model_copy(update={"format": form}) for part in chosen] + rest
        self._refuse(misfits, form)
        return self.model_copy(update={"groups": tuple(groups)})

    def _refuse(self, misfits: list[str], form: WeightFormat) -> None:
        """ValueError where there are layers, named with their columns, that cannot be stored as `form`."""
        if misfits:
            common = math.gcd(*(group.shape[1] for group in self.linear_groups))
            fitting = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if common % size == 0)
            raise ValueError(
                f"group_size: {form.group_size} does not divide the columns of {', '.join(misfits)}; {fitting} divides those of every layer"
            )

    def with_formats(self, formats: Mapping[str, WeightFormat]) -> "ModelSpec":
        """The Linear layers named in `formats` stored as it says, all others as they are.

        Groups come out the same whatever led to the formats: those of one module kind in the order of their bits, dense ones last.
        ValueError as of `with_format`.
        """
        groups: list[ModuleGroup] = []
        for group in self.groups:
            rest, wanted = [group], {formats[name] for name in group.module_names if name in formats}
            for form in sorted(wanted, key=lambda form: form.num_bits or 0) if group.kind == "linear" else ():
                self._refuse([f"{group.pattern} ({group.shape[1]})"] if form.group_size and group.shape[1] % form.group_size else [], form)
                names = {name for name in group.module_names if formats.get(name) == form}
                parts = [part.split(names.__contains__) for part in rest]
                groups += [part.model_copy(update={"format": form}) for chosen, _ in parts for part in chosen]
                rest = [part for _, others in parts for part in others]
            groups += rest
        return self.model_copy(update={"groups": tuple(groups)})

    def dense(self) -> "ModelSpec":
        """The same model with every weight dense, its cache layout and its zeros kept."""
        return ModelSpec.of(self.architecture).with_cache(self.kv_cache.mode).with_sparsity(self.sparsity)

    def resized(self, architecture: Architecture) -> "ModelSpec":
        """The dense model of another architecture, its cache stored as this one's; of its sparsity nothing is known, unless its layers
        are some of this one's.

        ValueError for a mixture of experts: which experts, and which neurons of each, would go is not settled yet.
        """
        if self.architecture.experts:
            raise ValueError(f"experts are not pruned yet, and {self.architecture.model_type} has them; take the stage out of the order")
        fewer = self.architecture.model_copy(update={"num_layers": architecture.num_layers})
        resized = ModelSpec.of(architecture).with_cache(self.kv_cache.mode)
        return resized.with_sparsity(self.sparsity) if architecture == fewer else resized

    def with_sparsity(self, sparsity: Sparsity | None) -> "ModelSpec":
        """The same model, with that known of its zeros."""
        return self.model_copy(update={"sparsity": sparsity})

    def with_cache(self, mode: CacheMode | BlockCache | None) -> "ModelSpec":
        """The same model, its KV cache stored in that mode."""
        return self.model_copy(update={"kv_cache": self.kv_cache.model_copy(update={"mode": mode})})

    def in_dtype(self, dtype: DType) -> "ModelSpec":
        """The same model with what is dense, and the scales of what is not, in that dtype: as it is in memory while it computes so."""
        return self.model_copy(update={"architecture": self.architecture.model_copy(update={"dtype": dtype})})

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor of the checkpoint."""
        return {
            f"{module}.{suffix}": entry
            for group in self.groups
            for module in group.module_names
            for suffix, entry in group.tensors(self.dtype).items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the checkpoint's files, headers not counted."""
        return sum(
            group.count * (tensor_bytes(dtype, shape) if dtype in BLOCKS else math.prod(shape) * ITEM_BYTES[dtype])
            for group in self.groups
            for dtype, shape in group.tensors(self.dtype).values()
        )

    @property
    def num_parameters(self) -> int:
        return sum(group.num_parameters for group in self.groups)

    @property
    def active_parameters(self) -> int:
        """Those that compute on one token: of a mixture of experts, of which each token visits a few, fewer than `num_parameters`."""
        experts, routed = self.architecture.experts, sum(group.num_parameters for group in self.groups if group.experts)
        return self.num_parameters - (routed - routed * experts.per_token // experts.count if experts else 0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_parameters

    def differences(self, table: Mapping[str, TensorEntry]) -> list[str]:
        """How a checkpoint's tensor table departs from this spec; empty when it is exactly this model."""
        expected = self.tensors()
        tied_copy = {"lm_head.weight"} if self.architecture.tied else set()
        extra = [
            name
            for name in table
            if name not in expected and name not in tied_copy and not any(fnmatch.fnmatch(name, p) for p in IGNORABLE)
        ]
        problems = [f"{name} is missing" for name in expected if name not in table] + [f"{name} is unexpected" for name in extra]
        for name, (dtype, shape) in expected.items():
            found = table.get(name)
            shape = found.shape if found and STATE in name else shape  # bitsandbytes' JSON is shorter where it was not padded
            if found and (found.dtype, found.shape) != (dtype, shape):
                problems.append(f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        return problems


def ignored(module: str, ignore: tuple[str, ...]) -> bool:
    """compressed-tensors' own rule for module names: exact, or `re:` and a pattern matched from the start.

    ValueError for a pattern that is no regular expression.
    """
    return any(_pattern(p[3:]).match(module) is not None if p.startswith("re:") else p == module for p in ignore)


def _split(group: ModuleGroup, ignore: tuple[str, ...]) -> tuple[list[ModuleGroup], list[ModuleGroup]]:
    """The modules that `ignore` does not name, and the others."""
    near = tuple(entry for entry in ignore if entry.startswith("re:") or group.may_hold(entry))
    return group.split(lambda name: not ignored(name, near)) if near else ([group], [])


@cache
def _pattern(written: str) -> re.Pattern[str]:
    try:
        return re.compile(written)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"ignore: 're:{written}' is not a regular expression ({error})") from None
