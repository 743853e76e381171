"""How likely a model finds a text, piece by piece, in nats.

| model | a piece's score |
| --- | --- |
| reads forward (`causal`) | log p(piece given all before it) |
| two towers (`bidirectional`) | that, plus log p(piece given all behind it) of the backward tower |
| fills masks (`masked`) | log p(piece given all others), itself masked: pseudo-log-likelihood (Salazar et al. 2020) |

These are not one quantity, and no two of them are compared. Every piece is scored once, markers and the frame are not.
The first piece needs something before it, and for a backward tower the last one something behind it: where texts have
no frame that is the token that ends documents, as in training. Texts longer than a Transformer's positions are read in
overlapping windows; a masked piece stands in the middle of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from plm.data import reading
from plm.data.reading import Text, Tokens
from plm.inference import batches
from plm.models.graph import ModelGraph

LOGIT_ROWS = 512  # tokens whose scores over the vocabulary are held at once


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """tokens: the text as it was read. directions: {"forward": ..}, {"forward": .., "backward": ..} or {"masked": ..},
    float64 [pieces] each. by_piece: their sum; by_word: sums over the pieces of each word; total: the text's."""

    tokens: Tokens
    directions: dict[str, np.ndarray]

    @property
    def by_piece(self) -> np.ndarray:
        return np.sum(list(self.directions.values()), axis=0)

    @property
    def by_word(self) -> np.ndarray:
        return np.bincount(self.tokens.word, self.by_piece, minlength=len(self.tokens.words))

    @property
    def total(self) -> float:
        return float(self.by_piece.sum())


def score(model, texts: Sequence[Text], within_words: bool, from_word: Sequence[int] | None) -> list[Score]:
    """See `Model.score`."""
    read = reading.read(model.tokenizer, texts)
    if from_word is None:
        first = [0] * len(texts)
    else:
        first = [int(np.searchsorted(word, start)) for word, start in zip(read.word, from_word, strict=True)]
    if model.head == "masked":
        found = {"masked": _masked(model, read, within_words, first)}
    else:
        found = _running(model, read, first)
    tokens = reading.tokenize(model.tokenizer, texts)
    return [Score(one, {name: found[name][text] for name in found}) for text, one in enumerate(tokens)]


def _running(model, read: reading.Reading, first: Sequence[int]) -> dict[str, list[np.ndarray]]:
    """{direction: [log-likelihood of each piece] of each text}; 0 for pieces before the first one that is wanted."""
    before, after = model.frame
    if not before:
        before = (model.tokenizer.role("eod"),)
    if not after and model.direction == "both":
        after = (model.tokenizer.role("eod"),)
    room = None if model.longest is None else model.longest - len(before) - len(after)
    windows = [
        window
        for text, ids in enumerate(read.ids)
        for window in reading.windows(
            text, len(ids), room, max((room or 1) // 2, 1), sees_right=model.direction == "both"
        )
        if window.last > first[text]
    ]
    names = ("forward", "backward") if model.direction == "both" else ("forward",)
    found = {name: [np.zeros(len(ids)) for ids in read.ids] for name in names}
    lengths = [len(before) + window.stop - window.start + len(after) for window in windows]
    for indices, rows, width in batches.batches(lengths, model.longest):
        here = [windows[index] for index in indices]
        ids = [[*before, *read.ids[w.text][w.start : w.stop].tolist(), *after] for w in here]
        batch = model.batch(ids, rows, width, read.open_words)
        targets, _ = batches.pad(ids, rows, width, 0)
        batch["targets"] = model.tokenizer.target_id(targets).astype(np.int32)
        for name, values in model.run(_running_program, batch, head=model.head).items():
            values = np.asarray(values, np.float64)
            for row, window in enumerate(here):
                at = len(before) - window.start
                start = max(window.first, first[window.text])
                found[name][window.text][start : window.last] = values[row, start + at : window.last + at]
    return found


def _masked(model, read: reading.Reading, within_words: bool, first: Sequence[int]) -> list[np.ndarray]:
    before, after = model.frame
    mask = model.tokenizer.role("mask")
    room = None if model.longest is None else model.longest - len(before) - len(after)
    places = [(text, place) for text, ids in enumerate(read.ids) for place in range(first[text], len(ids))]
    sizes = [len(ids) if room is None else min(len(ids), room) for ids in read.ids]
    found = [np.zeros(len(ids)) for ids in read.ids]
    lengths = [len(before) + sizes[text] + len(after) for text, _ in places]
    for indices, rows, width in batches.batches(lengths, model.longest):
        rows_ids, positions, targets = [], np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.int32)
        for row, index in enumerate(indices):
            text, place = places[index]
            ids, size = read.ids[text], sizes[text]
            start = min(max(place - size // 2, 0), len(ids) - size)
            hidden = ids[start : start + size].copy()
            stop = place + 1
            if within_words:
                stop = int(np.searchsorted(read.word[text], read.word[text][place], side="right"))
            hidden[place - start : stop - start] = mask
            rows_ids.append([*before, *hidden.tolist(), *after])
            positions[row], targets[row] = len(before) + place - start, model.tokenizer.target_id(ids[place])
        batch = model.batch(rows_ids, rows, width, read.open_words)
        batch |= {"positions": positions, "targets": targets}
        values = np.asarray(model.run(_masked_program, batch, head=model.head), np.float64)
        for row, index in enumerate(indices):
            text, place = places[index]
            found[text][place] = values[row, 0]
    return found


def _log_likelihoods(head, hidden_BxTxW: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """log softmax(scores)[target], float32 [B, T]; the scores of `LOGIT_ROWS` tokens are held at once, cut along T."""
    B, T = targets_BxT.shape
    n = next(n for n in range(1, T + 1) if T % n == 0 and (n == T or B * (T // n) <= LOGIT_ROWS))

    def part(inputs):
        hidden, targets = inputs
        scores = head.logits(hidden)
        return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(scores, axis=-1)

    def cut(x):
        return jnp.moveaxis(x.reshape(B, n, T // n, *x.shape[2:]), 1, 0)

    return jnp.moveaxis(jax.lax.map(part, (cut(hidden_BxTxW), cut(targets_BxT))), 0, 1).reshape(B, T)


def _running_program(graph: ModelGraph, head: str) -> Callable:
    def program(params, batch):
        model = graph.bind(params)
        batch = dict(batch)
        targets = batch.pop("targets")
        outputs, _ = model(batch, {})
        forward = outputs["forward"] if "forward" in outputs else outputs["hidden"]
        # What was read up to a token says what comes next: position t - 1 scores the token at t.
        found = {"forward": _log_likelihoods(model.heads[head], jnp.roll(forward, 1, axis=1), targets)}
        if "backward" in outputs:
            behind = jnp.roll(outputs["backward"], -1, axis=1)
            found["backward"] = _log_likelihoods(model.heads[head], behind, targets)
        return found

    return program


def _masked_program(graph: ModelGraph, head: str) -> Callable:
    def program(params, batch):
        model = graph.bind(params)
        batch = dict(batch)
        positions, targets = batch.pop("positions"), batch.pop("targets")
        outputs, _ = model(batch, {})
        hidden = jnp.take_along_axis(outputs["hidden"], positions[..., None], axis=1)
        return _log_likelihoods(model.heads[head], hidden, targets)

    return program
