"""Kneser-Ney: the textbook numbers, exact distributions, borders, both directions, and speed."""

import itertools
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from plm.analysis import ngrams
from plm.errors import UserError


def synthetic(n: int, vocabulary: int, seed: int = 0, documents: int = 5):
    """A stream with real bigram structure: each id prefers a few followers, whose ids are Zipf-like."""
    rng = np.random.default_rng(seed)
    followers = np.minimum(rng.zipf(1.3, size=(vocabulary, 20)) - 1, vocabulary - 1)
    choices = rng.integers(20, size=n)
    tokens = np.empty(n, np.int64)
    tokens[0] = 0
    for i in range(1, n):
        tokens[i] = followers[tokens[i - 1], choices[i]]
    return tokens, np.linspace(0, n, documents, endpoint=False).astype(np.int64)


def by_hand(tokens, starts, vocabulary, order):
    """The same model from its definition, with dictionaries and loops: returns P(w, history)."""
    bounds = [*starts, len(tokens)]
    documents = [["#", *tokens[a:b].tolist()] for a, b in itertools.pairwise(bounds)]
    raw, left = {}, {}
    for document in documents:
        for k in range(1, order + 1):
            for i in range(k - 1, len(document)):
                gram = tuple(document[i - k + 1 : i + 1])
                raw[gram] = raw.get(gram, 0) + 1
                if i - k >= 0:
                    left.setdefault(gram, set()).add(document[i - k])
    adjusted = {}
    for gram, count in raw.items():
        if gram[-1] == "#":
            continue
        adjusted[gram] = count if len(gram) == order else len(left.get(gram, ())) or count
    discounts = {}
    for k in range(1, order + 1):
        n = [0] * 5
        for gram, count in adjusted.items():
            if len(gram) == k and count <= 4:
                n[count] += 1
        if min(n[1:4]) == 0:  # a dozen ids have no counts of one, two or three: the documented stand-ins
            assert k == 1
            discounts[k] = [0, 0.5, 1, 1.5]
            continue
        y = n[1] / (n[1] + 2 * n[2])
        estimate = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        discounts[k] = [e if 0 < e < max(j, 1) else j / 2 for j, e in enumerate(estimate)]

    def probability(word, history):
        history = tuple(history)[-(order - 1) :] if order > 1 else ()

        def recurse(context):
            lower = recurse(context[1:]) if context else 1 / vocabulary
            k = len(context) + 1
            grams = {g: c for g, c in adjusted.items() if len(g) == k and g[:-1] == context}
            if not grams:
                return lower
            total = sum(grams.values())
            taken = {g: discounts[k][min(c, 3)] for g, c in grams.items()}
            own = (*context, word)
            share = (grams[own] - taken[own]) / total if own in grams else 0
            return share + sum(taken.values()) / total * lower

        return recurse(history)

    return probability, documents


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_the_definition(order):
    tokens, starts = synthetic(1500, 12)
    held_out, held_starts = synthetic(60, 12, seed=1, documents=3)
    model = ngrams.kneser_ney(tokens, starts, 12, (order,))[order]
    probability, _ = by_hand(tokens, starts, 12, order)
    got = ngrams.log_probabilities(model, held_out, held_starts)
    bounds = [*held_starts, len(held_out)]
    expected = [
        math.log(probability(held_out[i], ["#", *held_out[a:i].tolist()]))
        for a, b in itertools.pairwise(bounds)
        for i in range(a, b)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert ngrams.cross_entropy(model, held_out, held_starts) == pytest.approx(-np.mean(expected))


def test_every_distribution_sums_to_one_and_every_id_has_mass():
    vocabulary = 7
    tokens, starts = synthetic(300, vocabulary - 1)  # the last id never occurs in training
    for order, model in ngrams.kneser_ney(tokens, starts, vocabulary).items():
        histories = [()] + [(a,) for a in range(vocabulary)] + [(a, b) for a in range(vocabulary) for b in range(7)]
        histories += [tuple(tokens[i : i + 4]) for i in range(0, 200, 7)]
        for history in histories:
            for at_start in (False, True):
                p = ngrams.distribution(model, history, document_start=at_start)
                assert p.min() > 0
                assert math.isclose(p.sum(), 1.0, abs_tol=1e-12), (order, history)
        # ... and the distribution is the one that the cross-entropy uses.
        scored = np.array([2, 1, 6, 3, 3])
        expected = [ngrams.distribution(model, scored[:i], document_start=True)[scored[i]] for i in range(5)]
        np.testing.assert_allclose(np.exp(ngrams.log_probabilities(model, scored, np.array([0]))), expected)


def test_contexts_stop_at_document_borders():
    tokens, starts = synthetic(2000, 10)
    model = ngrams.kneser_ney(tokens, starts, 10)[5]
    first, second = tokens[:9], tokens[100:120]
    together = ngrams.log_probabilities(model, np.concatenate([first, second]), np.array([0, 9]))
    alone = ngrams.log_probabilities(model, second, np.array([0]))
    np.testing.assert_array_equal(together[9:], alone)
    running_on = ngrams.log_probabilities(model, np.concatenate([first, second]), np.array([0]))
    assert not np.array_equal(running_on[9:], alone)


def test_longer_contexts_help_where_there_is_structure_and_unseen_contexts_back_off():
    tokens, _ = synthetic(40000, 50)
    models = ngrams.kneser_ney(tokens[:20000], np.array([0]), 50)
    nats = {order: ngrams.cross_entropy(model, tokens[20000:], np.array([0])) for order, model in models.items()}
    assert nats[2] < nats[1] - 0.2
    tiny = ngrams.kneser_ney(np.array([0, 1, 2]), np.array([0]), 5)
    assert ngrams.distribution(tiny[5], [0, 1, 2, 0]).sum() == pytest.approx(1)  # no 5-gram was ever seen
    assert ngrams.distribution(tiny[5], [4, 4, 4, 4]) == pytest.approx(ngrams.distribution(tiny[2], [4]))


def test_sentences_are_documents_of_their_own():
    tokens, starts = synthetic(2000, 20)
    models = ngrams.kneser_ney(tokens, starts, 20)
    sentences = [[3], [1, 2, 3, 4], [1, 2]]
    for order, totals in ngrams.sentence_totals(models, sentences).items():
        alone = [ngrams.log_probabilities(models[order], np.array(ids), np.array([0])).sum() for ids in sentences]
        assert totals == pytest.approx(alone)


class FakeTokenizer:
    size, lossless = 6, True
    byte_lengths = np.array([0, 1, 3, 3, 4, 5])

    def __init__(self, roles):
        self.roles = roles

    def target_id(self, ids):
        return np.where(ids >= self.size, 0, ids)


def split():
    """Two documents: [[2 3] [4]] and [[5 9]]; 9 is an out-of-vocabulary word."""
    return SimpleNamespace(
        tokens=np.array([2, 3, 4, 5, 9], np.uint16),
        sentence_offsets=np.array([0, 2, 3, 5]),
        document_offsets=np.array([0, 2, 3]),
    )


def test_streams_are_the_targets_of_the_layouts():
    def streams(roles, layout):
        both = [ngrams.stream(split(), FakeTokenizer(roles), layout=layout, backward=b) for b in (False, True)]
        return [(tokens.tolist(), starts.tolist()) for tokens, starts in both]

    assert streams({"bos": 0, "eos": 1}, "lanes") == [
        ([2, 3, 1, 4, 1, 5, 0, 1], [0, 5]),
        ([0, 5, 0, 4, 0, 3, 2, 0], [0, 3]),
    ]
    assert streams({"eod": 1}, "blocks") == [([2, 3, 4, 1, 5, 0, 1], [0, 4]), ([0, 5, 1, 4, 3, 2, 1], [0, 3])]
    assert streams({}, "blocks") == [([2, 3, 4, 5, 0], [0, 3]), ([0, 5, 4, 3, 2], [0, 2])]


def test_baseline_rows_and_bits_per_byte():
    tokenizer = FakeTokenizer({"eod": 1})
    rows = ngrams.baselines(split(), split(), tokenizer, layout="blocks", orders=(1, 2), backward=True, masked=True)
    values = {row["metric"]: (row["value"], row["n"]) for row in rows}
    ways = ("forward", "backward", "forward_bits_per_byte", "backward_bits_per_byte")
    assert set(values) == {"unigram/masked", *(f"kneser_ney_{order}/{way}" for order in (1, 2) for way in ways)}
    nats, n = values["kneser_ney_2/forward"]
    bits_per_byte, n_bytes = values["kneser_ney_2/forward_bits_per_byte"]
    assert (n, n_bytes) == (7, 3 + 3 + 4 + 1 + 5 + 0 + 1)
    assert bits_per_byte * n_bytes == pytest.approx(nats * n / math.log(2))
    assert values["kneser_ney_1/forward"][0] == pytest.approx(values["kneser_ney_1/backward"][0])
    assert values["unigram/masked"][1] == 5
    (only,) = ngrams.baselines(split(), split(), tokenizer, layout="pairs", forward=False, masked=True)
    assert only["metric"] == "unigram/masked"


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match="training tokens"):
        ngrams.kneser_ney(np.array([], int), np.array([], int), 5)
    with pytest.raises(UserError, match="id 7 is outside"):
        ngrams.kneser_ney(np.array([1, 7]), np.array([0]), 5)
    with pytest.raises(UserError, match="begin with 0"):
        ngrams.kneser_ney(np.array([1, 2]), np.array([1]), 5)
    with pytest.raises(UserError, match="at least 1"):
        ngrams.kneser_ney(np.array([1, 2]), np.array([0]), 5, (0, 2))


def test_speed():
    """Half a million tokens at all orders take a couple of seconds, so nothing loops over tokens."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.2, size=500_000), 8192) - 1
    start = time.perf_counter()
    models = ngrams.kneser_ney(tokens, np.arange(0, 500_000, 1000), 8192)
    ngrams.cross_entropy(models[5], tokens[:50_000], np.array([0]))
    assert time.perf_counter() - start < 10
