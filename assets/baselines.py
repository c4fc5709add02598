"""Bits per byte of general compressors and of an order-3 byte model on the held-out text, beside the small model's.

    python assets/baselines.py            # needs the standard library that the snapshot was taken from, for the training text

gzip and xz (level 9) see all held-out documents as one file, which favours them. The byte model has seen the training text: orders 0 to 3
interpolated with Witten-Bell weights (Witten and Bell, 1991). `bits per byte` of a language model is its loss on the
documents, in bits, over their UTF-8 bytes.
"""

import gzip
import json
import lzma
import tempfile
from pathlib import Path

import numpy as np
from corpus import documents

from pipeline.artifact import Checkpoint, Dataset
from pipeline.stage import Context
from stages.evaluate import Evaluate

ORDER = 3
HERE = Path(__file__).parent


def context_codes(text: np.ndarray, order: int) -> np.ndarray:
    """[len - ORDER] int64: each position's `order` bytes before it, as one number."""
    codes = np.zeros(len(text) - ORDER, dtype=np.int64)
    for back in range(order, 0, -1):
        codes = codes * 256 + text[ORDER - back : len(text) - back]
    return codes


def byte_model_bits(train: np.ndarray, held_out: np.ndarray) -> float:
    """Bits per byte of `held_out` (its first three bytes not counted)."""
    probability = np.full(len(held_out) - ORDER, 1 / 256)
    for order in range(ORDER + 1):
        contexts, pairs = context_codes(train, order), context_codes(train, order) * 256 + train[ORDER:]
        known, totals = np.unique(contexts, return_counts=True)
        known_pairs, counts = np.unique(pairs, return_counts=True)
        kinds = np.unique(known_pairs // 256, return_counts=True)[1]  # distinct next bytes, in the order of `known`
        seen = context_codes(held_out, order)
        total, kind = lookup(known, totals, seen), lookup(known, kinds, seen)
        count = lookup(known_pairs, counts, seen * 256 + held_out[ORDER:])
        probability = np.where(total > 0, (count + kind * probability) / np.maximum(total + kind, 1), probability)
    return float(-np.log2(probability).mean())


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where absent; `keys` is sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def main() -> None:
    texts = [json.loads(line)["text"] for line in (HERE / "data" / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    joined = "".join(texts).encode()
    train = np.frombuffer("".join(text for _, text in documents("train")).encode(), dtype=np.uint8).astype(np.int64)
    print(f"{len(texts)} documents, {len(joined):,} bytes held out; {len(train):,} bytes of training text")
    print(f"gzip -9        {8 * len(gzip.compress(joined, 9)) / len(joined):.3f} bits per byte")
    print(f"xz -9          {8 * len(lzma.compress(joined, preset=9)) / len(joined):.3f}")
    print(f"order-3 bytes  {byte_model_bits(train, np.frombuffer(joined, dtype=np.uint8).astype(np.int64)):.3f}")
    print(f"small model    {model_bits():.3f}")


def model_bits() -> float:
    """Bits per byte of the small model on the same documents, by the product's own evaluation."""
    stage = Evaluate()
    with tempfile.TemporaryDirectory() as folder:
        report = stage.run(
            Context(Path(folder), emit=lambda event: None),
            Checkpoint(HERE / "small-llama"),
            Dataset(HERE / "data" / "eval.jsonl"),
        )
    return report.metrics["bits_per_byte"]


if __name__ == "__main__":
    main()
