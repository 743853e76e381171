"""Pseudo-words: the rule picks what it says, chance is exactly one half, and context that tells is measured as such."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from plm.analysis.pseudo_words import Occurrence, Pair, Settings, choose, evaluate, scores
from plm.randomness import stable_hash

SETTINGS = Settings(skip_ranks=2, pairs=3, most=6, fewest=3, longest=12, margin=1)


def sentence(word: str, tail: str) -> str:
    return f"we saw {word} near {tail} today"


def corpus():
    """Ranks: saw, near (passed over), then apple, berry, cherry, date by frequency; documents of three sentences."""
    train = [[sentence("apple", "x")] * 9 + [sentence("berry", "x")] * 8 + [sentence("cherry", "x")] * 7]
    train += [[sentence("dates", "x")] * 6 + ["saw near saw near"] * 20]
    held_out = []
    for d in range(4):
        held_out.append(
            [sentence(word, f"{tail}{d}") for tail in "ab" for word in ("apple", "berry", "cherry", "dates")]
        )
    return train, held_out


def test_the_rule():
    train, held_out = corpus()
    held_out[0] += [
        "we saw apple near Berry, today",  # holds both
        "we saw apple near apple today",  # twice
        "apple was near us today",  # too close to the border
        "we saw Apple near q today",  # not bare lower case
        "we saw berry near " + "very " * 12 + "far",  # too long
        sentence("apple", "a0"),  # an equal sentence again
    ]
    pairs = choose(train, held_out, Settings(skip_ranks=3, pairs=3, most=6, fewest=3, longest=12, margin=1))
    # "today" is the third frequent plain word and is passed over with "saw" and "near".
    assert [pair.words for pair in pairs] == [("apple", "berry"), ("cherry", "dates")]
    for pair in pairs:
        assert pair.n == 6
        for word, side in zip(pair.words, pair.occurrences, strict=True):
            assert all(o.words[o.position] == word and o.words.count(word) == 1 for o in side)
            assert len({o.words for o in side}) == 6
            assert len({o.words[-2][-1] for o in side}) == 4, "all four documents are used before one is used twice"
    assert choose(train, held_out, Settings(skip_ranks=3, pairs=1, fewest=3, longest=12, margin=1))[1:] == []
    assert choose(train, held_out[:1], Settings(skip_ranks=3, fewest=3, longest=12, margin=1)) == []
    assert choose(train, held_out, SETTINGS) == choose(iter(train), iter(held_out), SETTINGS)


def some_pairs(n_pairs=12, n=5):
    def side(word, k):
        return tuple(Occurrence(("the", word, f"{word}-{k}-{i}"), 1) for i in range(n))

    return [Pair((f"one{k}", f"two{k}"), (side(f"one{k}", k), side(f"two{k}", k))) for k in range(n_pairs)]


def oracle(sentences, targets):
    """Reads the true word from the context; its lower layer knows nothing but the sentence."""
    top, bottom = [], []
    for words, target in zip(sentences, targets, strict=True):
        assert not words[target].startswith(("one", "two")) or words[0] == "the"
        noise = np.random.default_rng(stable_hash(words[2])).standard_normal(8)
        bottom.append(noise)
        top.append(noise * 0.1 + np.eye(8)[0 if words[2].startswith("one") else 1])
    return {"layer 1": np.array(bottom, np.float32), "layer 2": np.array(top, np.float32)}


def constant(sentences, targets):
    """A static vector of the written form."""
    forms = [words[target] for words, target in zip(sentences, targets, strict=True)]
    return {"layer 2": np.stack([np.full(8, 1.0 + len(form) + int(form[3:])) for form in forms]).astype(np.float32)}


def test_context_is_found_and_a_static_vector_is_at_chance_exactly():
    rows, record = evaluate(oracle, some_pairs(), control=constant)
    value = {row["metric"]: row["value"] for row in rows}
    assert value["trained/auc/layer 2"] > 0.99
    assert value["trained/nearest_neighbour/layer 2"] > 0.99
    assert abs(value["trained/auc/layer 1"] - 0.5) < 0.15
    for measure in ("auc", "nearest_neighbour"):
        assert value[f"static/{measure}/form"] == 0.5
        assert value[f"random_init/{measure}/layer 2"] == 0.5
        assert value[f"trained-random_init/{measure}/layer 2"] == value[f"trained/{measure}/layer 2"] - 0.5
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 12 for row in rows)
    assert record["headline_layer"] == "layer 2"
    assert len(record["pairs"]) == 12


def test_chance_is_one_half_for_vectors_that_know_nothing():
    rng = np.random.default_rng(0)
    drawn = [scores(rng.standard_normal((12, 4)), 6) for _ in range(3000)]
    for measure in ("nearest_neighbour", "auc"):
        values = np.array([d[measure] for d in drawn])
        assert abs(values.mean() - 0.5) < 4 * values.std() / np.sqrt(len(values))


def test_auc_is_the_rank_statistic():
    x = np.random.default_rng(1).standard_normal((10, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = unit @ unit.T
    same = [s[i, j] for i in range(10) for j in range(i) if (i < 5) == (j < 5)]
    other = [s[i, j] for i in range(10) for j in range(i) if (i < 5) != (j < 5)]
    expected = mannwhitneyu(same, other).statistic / (len(same) * len(other))
    assert scores(x, 5)["auc"] == pytest.approx(expected)


def test_every_sentence_is_read_once_with_each_form():
    pairs = some_pairs(2, 3)
    calls = []

    def spy(sentences, targets):
        calls.append((sentences, targets))
        return oracle(sentences, targets)

    _, record = evaluate(spy, pairs)
    ((sentences, targets),) = calls
    assert [words[target] for words, target in zip(sentences, targets, strict=True)] == (
        ["one0"] * 6 + ["two0"] * 6 + ["one1"] * 6 + ["two1"] * 6
    )
    picture = record["picture"]
    assert picture["form"] == picture["words"][0]
    assert np.array(picture["panels"]["trained"]["points"]).shape == (6, 2)
    assert picture["truth"] == [0, 0, 0, 1, 1, 1]


def test_a_text_too_small_gives_a_reason():
    rows, record = evaluate(oracle, [])
    assert rows == []
    assert "too small" in record["reason"]
