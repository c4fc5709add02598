"""How unlike two samples of text are, from the bytes alone: whatever the language, the script or the tokenizer.

The distributions of three successive UTF-8 bytes are compared by the Jensen-Shannon divergence (Lin, 1991,
https://doi.org/10.1109/18.61115): 0 bits for the same distribution, 1 bit for two that have nothing in common.
Samples of n bytes of one text differ by chance, the more the smaller n is; so a figure means something only beside that of two samples
of one text, equally large.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Counts = tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]  # trigrams as numbers, ascending, and the share of each


def trigram_shares(pieces: Sequence[bytes]) -> Counts:
    """Of all pieces of at least three bytes together. ValueError where there is none."""
    found = []
    for piece in pieces:
        values = np.frombuffer(piece, np.uint8).astype(np.uint32)
        if len(values) >= 3:
            found.append((values[:-2] << 16) | (values[1:-1] << 8) | values[2:])
    if not found:
        raise ValueError("there is no piece of three bytes")
    trigrams, counts = np.unique(np.concatenate(found), return_counts=True)
    return trigrams, counts / counts.sum()


def divergence(one: Counts, other: Counts) -> float:
    """Jensen-Shannon divergence in bits, 0 to 1."""
    trigrams = np.union1d(one[0], other[0])
    shares = np.zeros((2, len(trigrams)))
    for row, (known, share) in zip(shares, (one, other), strict=True):
        row[np.searchsorted(trigrams, known)] = share
    middle = _entropy(shares.mean(axis=0))
    return float(min(max(middle - (_entropy(shares[0]) + _entropy(shares[1])) / 2, 0.0), 1.0))


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    """In bits."""
    positive = shares[shares > 0]
    return -float(positive @ np.log2(positive))
