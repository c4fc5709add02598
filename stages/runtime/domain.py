"""Is a text of the same kind as the evaluation text? Measured by how unlike two random samples of them are, against two of one text.

Documents of the evaluation text are dealt into two halves. The other text is compared with the one half, and the other half with it too,
all by samples of the same number of bytes; that is repeated for `DRAWS` halvings. With D the mean divergence between the texts and B that
between the halves, both in bits (stages/functional/byte_trigrams.py),

    shift = (D - B) / (1 - B)          0: as like as another half of the same text, 1: nothing in common

which, unlike D, hardly depends on how much text there is. Measured with samples of 2 KB, 10 KB (means of four) and 115 KB or more:

    held-out modules of the standard library, and its other modules       0.03  0.07  0.04     the same kind
    messages of a version control system, and of a database server        0.20  0.19  0.20     both English
    licences, and Python's reference                                      0.28  0.23  0.24     both English
    Python code, and licences                                             0.22  0.28  0.30
    Python code, and stories for children                                 0.44  0.47  0.48
    messages of one program in English, and in French                     0.36  0.37  0.35
    the same in English, and in German                                    0.48  0.45  0.42
    the same in German, and in French                                     0.50  0.48  0.47
    the same in English, and in Chinese                                   0.81  0.77  0.74

So `FAR` is 0.27. Samples of 2 KB say less: one draw of text from there varies by 0.1.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.functional.byte_trigrams import divergence, trigram_shares

FAR = 0.27
PIECE_BYTES = 1000  # of a document, kept or left out together
KEPT_PIECES = 1024  # of a text: a uniform sample of all its pieces
SAMPLE_BYTES = 1 << 18  # of a text, in one comparison at most
DRAWS = 8

Piece = tuple[int, bytes]  # the document it is from, and its bytes


@dataclass
class TextSample:
    """A uniform sample of a text's pieces, drawn while it is read (reservoir sampling), the same for the same text."""

    pieces: list[Piece] = field(default_factory=list)
    seen: int = 0
    documents: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(0)

    def watch(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The same (id, text); each is taken into account as it passes."""
        for name, text in documents:
            content = text.encode("utf-8", "replace")
            for start in range(0, len(content), PIECE_BYTES):
                self._add((self.documents, content[start : start + PIECE_BYTES]))
            self.documents += 1
            yield name, text

    def _add(self, piece: Piece) -> None:
        self.seen += 1
        if len(self.pieces) < KEPT_PIECES:
            self.pieces.append(piece)
        elif (place := self._random.randrange(self.seen)) < KEPT_PIECES:
            self.pieces[place] = piece


@dataclass(frozen=True)
class DomainShift:
    """Distances are square roots of divergences, which makes them a metric: 0 is the same text, 1 nothing in common.

    `spread` is the standard deviation of `baseline` over the halvings: large where documents are few, or unlike each other.
    """

    distance: float
    baseline: float
    spread: float
    shift: float

    @property
    def far(self) -> bool:
        """Far above what unlike documents and chance explain."""
        return self.shift > FAR and self.distance > self.baseline + 2 * self.spread


def domain_shift(text: TextSample, other: TextSample, seed: int) -> DomainShift | None:
    """None where the samples are too small to be halved and compared: less than two pieces, or than one of the other text."""
    if len(text.pieces) < 2 or sum(len(piece) for _, piece in other.pieces) < PIECE_BYTES:
        return None
    generator = np.random.default_rng(seed)
    apart, within = np.zeros(DRAWS), np.zeros(DRAWS)
    for draw in range(DRAWS):
        halves = _halves(text.pieces, generator)
        texts = [*halves, [piece for _, piece in other.pieces]]
        size = min(SAMPLE_BYTES, *(sum(map(len, pieces)) for pieces in texts))
        one, two, three = (trigram_shares(_take(pieces, size, generator)) for pieces in texts)
        within[draw], apart[draw] = divergence(one, two), divergence(one, three)
    between, chance = float(apart.mean()), float(within.mean())
    shift = (between - chance) / (1 - chance) if chance < 1 else 0.0
    return DomainShift(between**0.5, chance**0.5, float(np.sqrt(within).std()), shift)


def _halves(pieces: Sequence[Piece], generator: np.random.Generator) -> tuple[list[bytes], list[bytes]]:
    """Whole documents dealt at random until one half has half of the bytes; of a single document, its pieces."""
    several = len({document for document, _ in pieces}) > 1
    groups: dict[int, list[bytes]] = {}
    for number, (document, piece) in enumerate(pieces):
        groups.setdefault(document if several else number, []).append(piece)
    order = generator.permutation(len(groups))
    shuffled = [list(groups.values())[place] for place in order]
    total, dealt, cut = sum(len(piece) for _, piece in pieces), 0, 0
    while cut < len(shuffled) - 1 and (cut == 0 or dealt < total / 2):
        dealt += sum(map(len, shuffled[cut]))
        cut += 1
    return [p for group in shuffled[:cut] for p in group], [p for group in shuffled[cut:] for p in group]


def _take(pieces: Sequence[bytes], size: int, generator: np.random.Generator) -> list[bytes]:
    """Pieces at random, `size` bytes together, the last one cut."""
    taken, left = [], size
    for place in generator.permutation(len(pieces)):
        if left <= 0:
            break
        taken.append(pieces[place][:left])
        left -= len(taken[-1])
    return taken
