"""Span extraction, the half before the model: windows over a long context, pieces <-> characters, answers -> pieces.

The rules are those of BERT's code for SQuAD (run_squad.py): a question cut to `QUESTION` pieces, rows of `LENGTH`, a
new window every `STRIDE` pieces, and of each piece only the window in which it has most context. What comes after the
model is `plm.analysis.span_decoding`.

One thing is done differently. That code knows which white-space word a piece belongs to and cuts the predicted text out
of the words afterwards, by aligning letters; here each piece's characters are found once, by the same alignment
(`piece_spans`), and an answer is a slice of the context. Where letters cannot be aligned (an unknown piece, half a
character of a byte-level vocabulary) the piece stands for its whole word, as there.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from plm.data.tokenizers import Tokenizer

QUESTION, LENGTH, STRIDE = 64, 384, 128


def windows(n: int, room: int, stride: int = STRIDE) -> np.ndarray:
    """int64 [windows, 2]: [start, stop) of the windows over n pieces, `room` long at most, one every `stride`.

    The last one is the first that reaches the end; a context that fits has one window.
    """
    if room < 1 or stride < 1:
        raise ValueError(f"windows of {room} pieces every {stride}: both must be at least 1")
    starts = [0]
    while starts[-1] + room < n:
        starts.append(starts[-1] + min(stride, room))
    return np.array([(start, min(start + room, n)) for start in starts], np.int64)


def most_context(spans: np.ndarray, n: int, *, sees_right: bool = True) -> np.ndarray:
    """int64 [n]: for each piece the window with most context: the smaller of the numbers of pieces left and right of
    it, plus a hundredth of the window's length; of equal ones the first.

    spans: int [windows, 2] of `windows`, which together cover all n pieces. sees_right: a model that sees the left
    side only has its context there, so only that counts.
    """
    best, owner = np.full(n, -1.0), np.zeros(n, np.int64)
    for number, (start, stop) in enumerate(spans):
        left = np.arange(stop - start)
        score = np.minimum(left, left[::-1]) + 0.01 * (stop - start) if sees_right else left
        better = score > best[start:stop]
        best[start:stop][better] = score[better]
        owner[start:stop][better] = number
    return owner


# --------------------------------------------------------------------------------------------------- pieces, characters


def word_spans(text: str) -> np.ndarray:
    """int64 [words, 2]: the characters [start, stop) of what stands between white space."""
    return np.array([match.span() for match in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)


def spelling(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each piece is written like in a text, without ## and </w>; U+FFFD for a part of a character."""
    written = {i: tokenizer.decode([i]).removeprefix("##").strip() for i in set(map(int, ids))}
    return [written[int(i)] for i in ids]


def piece_spans(text: str, words: np.ndarray, word: np.ndarray, spelled: Sequence[str]) -> np.ndarray:
    """int64 [n, 2]: the characters [start, stop) of each piece, rising.

    words: int [words, 2], characters of each word. word: int [n], rising, the word of each piece. spelled: [n].
    Letters are compared without case and accents.
    """
    spans = words[np.asarray(word, np.int64)].copy()
    firsts = np.flatnonzero(np.diff(word, prepend=-1)) if len(word) else []
    for first, stop in zip(firsts, [*firsts[1:], len(word)], strict=True):
        begin, end = words[word[first]]
        letters = [(letter, i) for i in range(begin, end) for letter in _letters(text[i])]
        pieces = [_plain(piece) for piece in spelled[first:stop]]
        if not all(pieces) or "".join(pieces) != "".join(letter for letter, _ in letters):
            continue
        borders = itertools.accumulate(map(len, pieces), initial=0)
        for piece, (a, b) in enumerate(itertools.pairwise(borders)):
            spans[first + piece] = letters[a][1], letters[b - 1][1] + 1
    return spans


@functools.lru_cache(maxsize=1 << 16)
def _letters(character: str) -> str:
    """A character in lower case, without accents: usually one letter, none for an accent of its own."""
    normal = unicodedata.normalize("NFD", character.lower())
    return "".join(one for one in normal if unicodedata.category(one) != "Mn")


@functools.lru_cache(maxsize=1 << 16)
def _plain(piece: str) -> str:
    return "".join(map(_letters, piece))


def answer_pieces(spans: np.ndarray, start: int, stop: int) -> tuple[int, int] | None:
    """(first, last) piece of the characters [start, stop), or None where no piece holds one of them."""
    first = int(np.searchsorted(spans[:, 1], start, side="right"))
    last = int(np.searchsorted(spans[:, 0], stop, side="left")) - 1
    return (first, last) if first <= last else None


def positions(window: np.ndarray, answer: tuple[int, int] | None, offset: int, null: int = 0) -> tuple[int, int]:
    """Target positions (start, end) of a row; `null` for both where the window does not hold the whole answer.

    window: [start, stop) in pieces of the context. offset: position of the context's first piece in the row.
    """
    if answer is None or answer[0] < window[0] or answer[1] >= window[1]:
        return null, null
    return int(answer[0] - window[0] + offset), int(answer[1] - window[0] + offset)
