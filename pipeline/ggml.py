"""llama.cpp's tensor types: how many values a block holds, and how many bytes it takes.

A row of a matrix is a whole number of blocks. Example: 4096 values as Q4_K are 16 blocks of 256, 16 * 144 = 2,304 bytes, which is 4.5 bits
for each value. Sizes: ggml-common.h of llama.cpp (static assertions on its block structs), as built into llama-cpp-python 0.3.36.
"""

import math

# type -> (values in a block, bytes of a block)
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
# type -> its number in a file (enum ggml_type)
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30,
}  # fmt: skip


def row_bytes(kind: str, columns: int) -> int:
    """Of a row of that many values; a row that ends within a block takes all of it."""
    values, nbytes = BLOCKS[kind]
    return math.ceil(columns / values) * nbytes


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Of a tensor of `shape`, its rows along the last dimension."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
