"""Scores are log-softmaxes that can be computed by hand, text by text, piece by piece."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures.models import one_piece

from plm.data.tokenizers import Tokenizer
from plm.inference import batches

TEXTS = ["Bakelimo ramose, bali!", "", "Mo zazu ra.", "keli " * 3 + "xyzzy", ["Ra", "mo", "don't"]]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def framed(model, ids):
    roles = model.tokenizer.roles
    before, after = model.frame
    if not before:
        before = (roles["eod"],)
    if not after and model.direction == "both":
        after = (roles["eod"],)
    return [*before, *ids, *after], len(before)


def by_hand(model, output):
    """A function of ids: log softmax [T, vocabulary] of one row alone, float64."""

    @jax.jit
    def program(params, batch):
        module = model.graph.bind(params)
        return module.heads[model.head].logits(module(batch, {})[0][output])[0]

    def function(ids):
        batch = {"tokens": np.array([ids])}
        if model.config.model.get("segments"):
            batch["segments"] = np.zeros((1, len(ids)), np.int32)
        scores = np.asarray(program(model.params, batch), np.float64)
        top = scores.max(-1, keepdims=True)
        return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))

    return function


@pytest.mark.parametrize("name", ["gpt", "lstm", "towers"])
def test_a_running_score_is_the_sum_of_log_softmaxes(models, name):
    model = models[name]
    found = model.score(TEXTS)
    assert found[1].total == 0
    for text in (0, 4):
        tokens, score = model.tokenize(TEXTS)[text], found[text]
        ids, shift = framed(model, tokens.ids.tolist())
        n = len(tokens)
        forward = by_hand(model, "forward" if name == "towers" else "hidden")(ids)
        wanted = forward[np.arange(n) + shift - 1, tokens.ids]
        assert np.allclose(score.directions["forward"], wanted, atol=2e-5)
        if name == "towers":
            backward = by_hand(model, "backward")(ids)[np.arange(n) + shift + 1, tokens.ids]
            assert np.allclose(score.directions["backward"], backward, atol=2e-5)
            wanted = wanted + backward
        assert abs(score.total - wanted.sum()) < 1e-4 * n
        assert np.allclose(score.by_word.sum(), score.total)
        assert len(score.by_word) == len(score.tokens.words)


def test_open_words_are_spelled_in_their_own_batch_only(models, monkeypatch):
    model = models["elmo"]
    texts = [f"unknown{i} other{i}" for i in range(20)]
    whole = model.score(texts)
    spelled = []
    real = Tokenizer.character_rows

    def counted(self, words=None):
        spelled.extend(words or ())
        return real(self, words)

    monkeypatch.setattr(Tokenizer, "character_rows", counted)
    monkeypatch.setitem(batches.BATCH_TOKENS, "cpu", 64)  # five batches
    again = model.score(texts)
    assert sorted(spelled) == sorted(word for text in texts for word in text.split())
    assert [one.total for one in again] == pytest.approx([one.total for one in whole], abs=1e-4)


def test_a_pseudo_log_likelihood_masks_one_piece_at_a_time(models):
    model = models["bert"]
    (tokens,), (score,) = model.tokenize(TEXTS[:1]), model.score(TEXTS[:1])
    (inside,) = model.score(TEXTS[:1], within_words=True)
    mask = model.tokenizer.role("mask")
    ids, shift = framed(model, tokens.ids.tolist())
    assert len(set(tokens.word)) < len(tokens), "a word of several pieces"
    scores = by_hand(model, "hidden")
    for place in range(len(tokens)):
        hidden = list(ids)
        hidden[place + shift] = mask
        wanted = scores(hidden)[place + shift, tokens.ids[place]]
        assert abs(score.directions["masked"][place] - wanted) < 2e-5
        for other in range(place, len(tokens)):
            if tokens.word[other] == tokens.word[place]:
                hidden[other + shift] = mask
        wanted = scores(hidden)[place + shift, tokens.ids[place]]
        assert abs(inside.directions["masked"][place] - wanted) < 2e-5


@pytest.mark.parametrize("name", ["elmo", "gpt", "bert", "masked", "lstm", "towers"])
def test_batched_is_alone(models, name):
    model = models[name]
    together = model.score(TEXTS)
    for text in (0, 4):
        (alone,) = model.score([TEXTS[text]])
        assert np.allclose(alone.by_piece, together[text].by_piece, atol=2e-5)
        assert (together[text].by_piece < 0).all()
        assert alone.tokens.pieces == together[text].tokens.pieces


@pytest.mark.parametrize("name", ["gpt", "bert", "towers"])
def test_a_text_longer_than_the_positions_is_scored_whole(models, name):
    model = models[name]
    word = one_piece(model)
    text = " ".join([word] * 3 + ["Mo zazu ra."] + [word] * 90)
    (score,) = model.score([text])
    n = len(score.tokens)
    assert n > 90
    assert len(score.by_piece) == n
    assert (score.by_piece < 0).all()
    if name == "gpt":
        (short,) = model.score([" ".join(text.split()[:20])])
        m = len(short.tokens)
        assert np.allclose(score.by_piece[:m], short.by_piece, atol=2e-5), "the first window begins the text"


def test_scores_move_with_the_parameters_and_share_programs(models):
    model = dataclasses.replace(models["gpt"], _shared={})
    before = model.score(TEXTS)[0].total
    zeros = dataclasses.replace(model, params=jax.tree.map(np.zeros_like, model.params))
    after = zeros.score(TEXTS)[0]
    assert after.total != before
    uniform = -np.log(model.tokenizer.size) * len(after.tokens)
    assert abs(after.total - uniform) < 1e-3, "zero parameters: every piece is as likely as any other"
