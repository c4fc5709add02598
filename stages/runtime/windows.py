"""How text is cut for scoring, and how much of it is scored at once. Needs no torch: a plan reads it.

A document of n tokens is cut into windows that overlap by one token: the last token of one window is the first context of
the next. With windows of 4, ids a b c d e f g become `a b c d` (scores b c d) and `d e f g` (scores e f g), so each token but
the document's first is scored exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

LOGITS_BYTES = 64 << 20  # float32 logits of one chunk of tokens ...
LOGITS_BUFFERS_ALONE = 2  # ... and how many such buffers live at the peak: logits and log-probabilities ...
LOGITS_BUFFERS = 7  # ... or, where two models are compared, those of both, probabilities, a difference and their product

BUCKET, EVEN_UP_TO = 64, 512  # tokens of context: buckets of one width up to here, after that each as wide as all before it

# Where a model runs layer by layer (stages/runtime/layerwise.py):
VOCABULARY_ROWS = 8192  # rows of the embedding or head in memory at once: the head of a 128k x 8192 model is larger than its layers
MICRO_BATCH_TOKENS = 512  # more is no faster on a CPU, and leaves the allocator larger blocks to keep
HIDDEN_STATES = 4 << 30  # RAM for the hidden states of the text in flight, unless a stage is told otherwise


@dataclass(frozen=True)
class Window:
    """At most `max_length` consecutive token ids of one document, which is numbered from 0."""

    document: int
    ids: Sequence[int]


def cut_windows(documents: Sequence[Sequence[int]], max_length: int) -> list[Window]:
    """Windows of all documents, longest first so that a batch holds little padding."""
    assert max_length > 1, "a window needs a token of context and a token to score"
    step = max_length - 1
    windows = [Window(n, ids[start : start + max_length]) for n, ids in enumerate(documents) for start in range(0, len(ids) - 1, step)]
    return sorted(windows, key=lambda window: -len(window.ids))


def scored(windows: Sequence[Window]) -> int:
    """Tokens: all of a window but its first."""
    return sum(len(window.ids) - 1 for window in windows)


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[Sequence[Window]]:
    for first in range(0, len(windows), batch_size):
        yield windows[first : first + batch_size]


def group_batches(work: Sequence[Sequence[Window]], tokens: int) -> Iterator[Sequence[Sequence[Window]]]:
    """Consecutive batches of at most `tokens` tokens together, padding counted; a batch that is larger stands alone."""
    group: list[Sequence[Window]] = []
    held = 0
    for batch in work:
        size = len(batch) * max(len(window.ids) for window in batch)
        if group and held + size > tokens:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group


def position_buckets(window: int) -> list[tuple[int, int]]:
    """(from, to) of each bucket of positions in a window of that length: 0-64, 64-128, ... 448-512, 512-1024, 1024-2048, ...

    A token's position is the number of tokens before it in its window, which is all the context it is scored with. The window ends
    the last bucket.
    """
    edges = [*range(0, min(window, EVEN_UP_TO), BUCKET)]
    edge = EVEN_UP_TO
    while edge < window:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, window]))


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose float32 logits fill LOGITS_BYTES."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))
