"""Integers of b bits in int32 words, as GPTQ and AWQ checkpoints hold them. Pure tensor maths.

The lowest bits of a word are its first value. AWQ's files have the eight values of a word in another order, which suits
a kernel that converts two at once: the value for column c of eight is at position AWQ_POSITION[c].
"""

import torch

AWQ_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_rows(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[words, columns] int32 to [words * 32 / num_bits, columns] int8: values lie along rows.

    What is stored as 0 to 2**num_bits - 1 becomes that less 2**(num_bits - 1). `num_bits` divides 32.
    """
    return _signed((words[:, None, :] >> _shifts(num_bits)[None, :, None]), num_bits).flatten(0, 1)


def unpack_columns(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[rows, words] int32 to [rows, words * 32 / num_bits] int8: values lie along columns. Else as `unpack_rows`."""
    return _signed((words[:, :, None] >> _shifts(num_bits)), num_bits).flatten(1, 2)


def in_awq_order(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 4-bit values as they stand in AWQ's words, to the order of the columns that they belong to."""
    words = values.reshape(len(values), -1, len(AWQ_POSITION))
    return words[:, :, list(AWQ_POSITION)].reshape(values.shape)


def _shifts(num_bits: int) -> torch.Tensor:
    assert 32 % num_bits == 0, f"{num_bits} bits cross the words"
    return torch.arange(0, 32, num_bits, dtype=torch.int32)


def _signed(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    signed: torch.Tensor = (values & (2**num_bits - 1)) - 2 ** (num_bits - 1)
    return signed.to(torch.int8)
