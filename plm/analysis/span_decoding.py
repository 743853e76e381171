"""Span extraction, the half after the model: start and end logits of all windows of a question -> a text.

The rules of BERT's code for SQuAD (run_squad.py), pure NumPy: of each window the `n_best` starts and ends are paired;
a pair counts if both are in the window's context, the start has most context there (`spans.most_context`), the end is
not before the start and the answer has at most `longest` pieces; pairs of all windows compete by the sum of their two
logits. A question is unanswerable if the least null score of its windows is more than `threshold` above the best pair.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from plm.data import spans

N_BEST, LONGEST = 20, 30


@dataclasses.dataclass(frozen=True, eq=False)
class WindowLogits:
    """start, end: float [length], logits of a row's positions. window: [start, stop) of the context's pieces in it.
    offset: position of the first of these. null: position that means "no answer" ([CLS])."""

    start: np.ndarray
    end: np.ndarray
    window: tuple[int, int]
    offset: int
    null: int = 0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """first, last: pieces of the context; score: the sum of the two logits; probability: among the n best texts."""

    text: str
    first: int
    last: int
    score: float
    probability: float = 0.0


@dataclasses.dataclass(frozen=True)
class Decoded:
    """text: the best that is not empty ("" if no pair counts). candidates: the n best, each text once. null_odds: null
    score minus the best score; +inf if no pair counts."""

    text: str
    null_odds: float
    candidates: tuple[Candidate, ...]

    def answer(self, threshold: float | None = None) -> str:
        """The text, or "" where a threshold is given and the null odds are above it."""
        return "" if threshold is not None and self.null_odds > threshold else self.text


def pairs(logits: WindowLogits, allowed: np.ndarray, n_best: int = N_BEST, longest: int = LONGEST) -> np.ndarray:
    """float64 [k, 3]: (first, last, score) of a window's pairs that count, by the ranks of start and then end.

    allowed: bool [pieces of the window], those that may be a start.
    """
    size = logits.window[1] - logits.window[0]
    starts, ends = (np.argsort(-np.asarray(x, np.float64), kind="stable")[:n_best] for x in (logits.start, logits.end))
    first, last = (places - logits.offset for places in np.meshgrid(starts, ends, indexing="ij"))
    inside = (first >= 0) & (first < size) & (last >= 0) & (last < size)
    counts = inside & (last >= first) & (last - first < longest)
    counts[counts] = allowed[first[counts]]
    score = logits.start[starts].astype(np.float64)[:, None] + logits.end[ends].astype(np.float64)[None, :]
    begin = logits.window[0]
    return np.stack([first[counts] + begin, last[counts] + begin, score[counts]], axis=1)


def decode(
    rows: Sequence[WindowLogits],
    context: str,
    piece_spans: np.ndarray,
    *,
    n_best: int = N_BEST,
    longest: int = LONGEST,
) -> Decoded:
    """The answer to one question from all its windows.

    context: the text; piece_spans: int [pieces, 2], their characters.
    """
    owner = spans.most_context(np.array([row.window for row in rows]), len(piece_spans))
    found = np.concatenate(
        [pairs(row, owner[slice(*row.window)] == i, n_best, longest) for i, row in enumerate(rows)], axis=0
    )
    candidates: dict[str, Candidate] = {}
    for first, last, score in found[np.argsort(-found[:, 2], kind="stable")]:
        text = context[piece_spans[int(first), 0] : piece_spans[int(last), 1]]
        if text not in candidates:
            candidates[text] = Candidate(text, int(first), int(last), float(score))
        if len(candidates) == n_best:
            break
    best = list(candidates.values())
    if not best:
        return Decoded("", float("inf"), ())
    odds = np.exp([one.score - best[0].score for one in best])
    with_share = zip(best, odds / odds.sum(), strict=True)
    ranked = tuple(dataclasses.replace(one, probability=float(share)) for one, share in with_share)
    null = min(float(row.start[row.null]) + float(row.end[row.null]) for row in rows)
    return Decoded(ranked[0].text, null - ranked[0].score, ranked)
