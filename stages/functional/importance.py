"""How much a head, an MLP neuron or a layer matters: by its weights, or by what flows through it.

Weights are scored by products of norms over all matrices that a unit owns. A gated MLP computes
down(silu(gate x) * up x): scaling a neuron's row of `up` by c and its column of `down` by 1/c changes nothing, and a
product of norms does not change either, where a sum would. Likewise for the query, key, value and output of a head.

Activation scores follow Minitron (Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679), layers are scored by block
influence (Men et al., 2024, ShortGPT, https://arxiv.org/abs/2403.03853).

Ties go to the lower index and sums run in a fixed order, so that the same input always keeps the same units.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

BLOCK_ITEMS = 1 << 17  # in fp32 at once: stays in a core's cache, where a copy of a whole weight costs ten times as much


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """[rows] L2 norms in fp32 of a [rows, columns] weight of any floating dtype."""
    return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in _blocks(weight)])


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """[columns] L2 norms in fp32 of a [rows, columns] weight of any floating dtype."""
    squares = torch.zeros(weight.shape[1])
    for block in _blocks(weight):
        squares += block.mul_(block).sum(dim=0)
    return squares.sqrt_()


def _blocks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight in fp32, some rows at a time, each time in the same buffer."""
    rows = min(len(weight), max(1, BLOCK_ITEMS // weight.shape[1]))
    buffer = torch.empty(rows, weight.shape[1])
    for block in weight.split(rows):  # type: ignore[no-untyped-call]
        yield buffer[: len(block)].copy_(block)


def neuron_magnitude(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """[I] score of each MLP neuron from gate and up [I, H] and down [H, I]."""
    return row_norms(gate) * row_norms(up) * column_norms(down)


def head_magnitude(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, num_heads: int, num_kv_heads: int, qk_norm: bool
) -> torch.Tensor:
    """[heads] score of each query head with its share of the group's key and value.

    query [heads * D, H], key and value [kv_heads * D, H], output [H, heads * D]. With `qk_norm` (Qwen3) the size of queries and
    keys is normalised away before they meet, so that of their weights says nothing and is left out.
    """
    shared = num_heads // num_kv_heads
    score = _head_norms(column_norms(output), num_heads) * _head_norms(row_norms(value), num_kv_heads).repeat_interleave(shared)
    if not qk_norm:
        score *= _head_norms(row_norms(query), num_heads) * _head_norms(row_norms(key), num_kv_heads).repeat_interleave(shared)
    return score


def _head_norms(norms: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads] from the norms of the [heads * D] rows or columns that the heads own."""
    return norms.view(heads, -1).square().sum(1).sqrt()


def neuron_activation(activations: torch.Tensor) -> torch.Tensor:
    """[I] sum over tokens of |activation|, in fp64 on the CPU, from the [..., I] input of an MLP's down projection."""
    return activations.flatten(0, -2).abs().sum(0, dtype=torch.float32).cpu().double()


def head_activation(activations: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[heads] sum over tokens of the L2 norm of a head's output, in fp64 on the CPU, from the [..., heads * D] input of o_proj."""
    tokens = activations.flatten(0, -2)
    heads = tokens.view(len(tokens), -1, head_dim)
    norms: torch.Tensor = torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32)
    return norms.sum(0).cpu().double()


def block_influence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Sum over tokens of 1 - cosine of the hidden states [..., H] around a layer: 0 where it changes no direction."""
    return float((1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)).cpu().double().sum())


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[count] indices of the highest scores along the last dimension, ascending; of equal scores the lower index is kept."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def kept_groups(scores: torch.Tensor, num_kv_heads: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(query heads, KV heads): the `count` KV heads whose query heads score highest together, with those query heads."""
    groups = highest(scores.view(num_kv_heads, -1).sum(1), count)
    shared = len(scores) // num_kv_heads
    return (groups[:, None] * shared + torch.arange(shared)).flatten(), groups


def kept_queries(scores: torch.Tensor, num_kv_heads: int, count: int) -> torch.Tensor:
    """Query heads: in each group of a KV head the same number of highest scores, `count` in all."""
    best = highest(scores.view(num_kv_heads, -1), count // num_kv_heads)
    return (torch.arange(num_kv_heads)[:, None] * (len(scores) // num_kv_heads) + best).flatten()


def gather_columns(weight: torch.Tensor, kept: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`weight[:, kept]` into `out`, by numpy on the raw items: three times as fast as torch's index_select along dimension 1."""
    items = {2: torch.int16, 4: torch.int32}[weight.itemsize]
    np.take(weight.view(items).numpy(), kept.numpy(), axis=1, out=out.view(items).numpy(), mode="clip")  # mode raise would buffer `out`
    return out


def rows_of_heads(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Indices of the rows of a projection that belong to `heads`, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
