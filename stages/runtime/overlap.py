"""What of an evaluation text stands in another text, n-gram by n-gram, in memory for the smaller of the two."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from stages.functional.word_ngrams import Hashes, distinct, ngram_hashes, places_in, whole_hash, word_ids

Document = tuple[str, str]  # id and text


@dataclass(frozen=True)
class Prints:
    """Of a text: its n-grams and its whole documents, each once and ascending. 8 bytes for each."""

    ngrams: Hashes
    wholes: Hashes

    @classmethod
    def of(cls, documents: Iterable[Document], n: int) -> "Prints":
        ngrams, wholes = [np.zeros(0, np.uint64)], list[int]()
        for _, text in documents:
            ids = word_ids(text)
            if len(ids):
                ngrams.append(distinct(ngram_hashes(ids, n)))
                wholes.append(whole_hash(ids))
        return cls(distinct(np.concatenate(ngrams)), distinct(np.array(wholes, np.uint64)))

    def also_in(self, documents: Iterable[Document], n: int) -> "Prints":
        """Those of them that also stand in these documents, which are read once and not kept."""
        ngrams, wholes = np.zeros(len(self.ngrams), np.bool_), np.zeros(len(self.wholes), np.bool_)
        for _, text in documents:
            ids = word_ids(text)
            if len(ids):
                ngrams[places_in(self.ngrams, ngram_hashes(ids, n))] = True
                wholes[places_in(self.wholes, np.array([whole_hash(ids)], np.uint64))] = True
        return Prints(self.ngrams[ngrams], self.wholes[wholes])


@dataclass(frozen=True)
class DocumentOverlap:
    """One document of the evaluation text: how many n-grams it has, how many of them are shared, whether it is there as a whole."""

    name: str
    ngrams: int
    shared: int
    identical: bool

    @property
    def share(self) -> float:
        return self.shared / self.ngrams if self.ngrams else 0.0


def overlaps(documents: Iterable[Document], there: Prints, n: int) -> Iterator[DocumentOverlap]:
    """Of each document, against what is known to stand in the other text."""
    for name, text in documents:
        ids = word_ids(text)
        hashes = ngram_hashes(ids, n)
        whole = len(ids) > 0 and len(places_in(there.wholes, np.array([whole_hash(ids)], np.uint64))) > 0
        yield DocumentOverlap(name, len(hashes), len(places_in(there.ngrams, hashes)), whole)
