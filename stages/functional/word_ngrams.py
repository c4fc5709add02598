"""Texts as hashed n-grams of words, for counting what two texts have in common.

A word is a run of letters and digits, folded to one case: punctuation, white space, underscores and markup separate words and count for
nothing. Of scripts that are written without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) each character is a word. So

    word_ids("Paths, NOT bytes!") == word_ids("paths not   bytes")        # three ids of 64 bits

Hashes are of 64 bits: among a billion n-grams, one lookup in 10**10 finds what is not there.
"""

import re
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SPACE = re.compile(r"\s")
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no information is lost in the product

CHUNK = 1 << 18  # characters
KNOWN_WORDS = 1 << 17


def word_ids(text: str) -> Hashes:
    """[words] uint64, the same on every machine."""
    parts = [np.zeros(0, np.uint64)]
    for chunk in _chunks(text):
        if len(_KNOWN) > KNOWN_WORDS:
            _KNOWN.clear()
        words = WORD.findall(chunk.casefold())
        parts.append(np.fromiter(map(_KNOWN.__getitem__, words), np.uint64, len(words)))
    return np.concatenate(parts)


class _Ids(dict[str, int]):
    """Ids of the words met so far, which are few beside all words."""

    def __missing__(self, word: str) -> int:
        self[word] = found = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        return found


_KNOWN = _Ids()


def _chunks(text: str) -> Iterator[str]:
    """Cut at white space, so that not all words of a long text are held at once."""
    start = 0
    while start < len(text):
        gap = SPACE.search(text, start + CHUNK)
        end = gap.start() if gap else len(text)
        yield text[start:end]
        start = end


def ngram_hashes(ids: Hashes, n: int) -> Hashes:
    """[words - n + 1] uint64: a polynomial of each n words' ids, modulo 2**64. Fewer words are one n-gram, of all of them; none, none."""
    if len(ids) < n:
        return np.array([whole_hash(ids)] if len(ids) else [], np.uint64)
    count = len(ids) - n + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = hashes * FACTOR + ids[offset : offset + count]
    return hashes


def whole_hash(ids: Hashes) -> int:
    """Of a document: equal where all words are."""
    return int.from_bytes(blake2b(ids.astype("<u8").tobytes(), digest_size=8).digest(), "little")


def distinct(hashes: Hashes) -> Hashes:
    """Each once, ascending: a table to look up in. `np.unique` would go by way of a hash table, which takes ten times as long."""
    ordered = np.sort(hashes)
    first: npt.NDArray[np.bool_] = np.append(np.ones(min(len(ordered), 1), np.bool_), ordered[1:] != ordered[:-1])
    return ordered[first]


def places_in(table: Hashes, hashes: Hashes) -> npt.NDArray[np.intp]:
    """Where in the table those of the hashes stand that are in it, as often as they occur."""
    ordered = np.sort(hashes)  # neighbours are looked up in memory that is at hand
    places = np.searchsorted(table, ordered)
    places = np.minimum(places, max(len(table) - 1, 0))
    return places[table[places] == ordered] if len(table) else places[:0]
