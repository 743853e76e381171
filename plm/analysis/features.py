"""Contextual vectors of words and of expressions of several words, aligned to pieces in the two ways that are reported.

| alignment        | the vector is that of                              |
| ---------------- | -------------------------------------------------- |
| `last`           | the last piece, for all models and directions      |
| `first_and_last` | the first and the last piece, their mean           |

(docs/protocol.md, 11.) A tower that reads forward has seen the whole word at its last piece, one that reads backward at
its first. Everything is frozen: nothing of the model is trained on what comes out here.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from plm.data import reading

ALIGNMENTS = ("last", "first_and_last")
CHUNK = 4096  # texts whose ids and, of a model that reads characters, distinct words are held at once

Spans = Sequence[tuple[int, int]]


def of_spans(
    model, texts: Sequence[Sequence[str]], spans: Sequence[Spans], done: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the text, float32 [alignments, layers, spans, features]) of each text, in no particular order.

    texts: lists of words. spans: for each text the words [start, stop) of each expression; one of which the tokenizer
    leaves nothing gets zeros. done: is told of every text.
    """
    for index, vectors, word in _pieces(model, texts, done):
        found = np.zeros((len(ALIGNMENTS), vectors.shape[0], len(spans[index]), vectors.shape[2]), np.float32)
        if len(spans[index]):
            starts, stops = np.array(spans[index]).T
            first, last = np.searchsorted(word, starts), np.searchsorted(word, stops) - 1
            there = first <= last
            at_first, at_last = vectors[:, first[there]], vectors[:, last[there]]
            found[0][:, there] = at_last
            found[1][:, there] = (at_first + at_last) / 2
        yield index, found


def of_texts(
    model, texts: Sequence[Sequence[str]], done: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the text, float32 [layers, features]: the mean over its pieces), in no particular order."""
    for index, vectors, word in _pieces(model, texts, done):
        yield index, vectors.mean(axis=1) if len(word) else np.zeros(vectors.shape[::2], np.float32)


def _pieces(model, texts, done: Callable[[int], None]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, [layers, pieces, features], the word of each piece)."""
    for start in range(0, len(texts), CHUNK):
        chunk = [list(words) for words in texts[start : start + CHUNK]]
        word = reading.read(model.tokenizer, chunk).word
        for index, vectors in model.embed_each(chunk, "all", "subwords"):
            yield start + index, vectors, word[index]
            done(1)


def two_directions(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of some vectors: points [n, 2] and the share of the variance of each [2]."""
    left, singular, right = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    # A singular vector's sign is arbitrary: the largest loading points up.
    signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])
    missing = max(0, 2 - len(singular))  # of a single vector, or of vectors of one number
    points = np.pad((left * singular * signs)[:, :2], ((0, 0), (0, missing)))
    return points, np.pad((singular**2 / max((singular**2).sum(), 1e-12))[:2], (0, missing))
