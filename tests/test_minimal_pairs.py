"""Minimal pairs: the sums of the right pieces decide, ties count half, and the made set tells nothing to counts."""

import json
from collections import Counter

import numpy as np
import pytest
from fixtures import corpus

from plm.analysis import minimal_pairs
from plm.analysis.minimal_pairs import Outcome, Pair
from plm.data.reading import Tokens
from plm.errors import UserError
from plm.inference.scoring import Score

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Fake:
    """Scores that are looked up; a sentence's pieces are its words, `dunno` and `whatever` are both unknown."""

    reads_characters = False

    def __init__(self, totals: dict[str, dict[str, float]]):
        self.totals = totals

    def score(self, texts, *, within_words):
        assert within_words
        return [self._score(text) for text in texts]

    def _score(self, text):
        words = text.split()
        ids = np.array([0 if word in ("dunno", "whatever") else sum(map(ord, word)) for word in words])
        directions = {name: np.full(len(words), own[text] / len(words)) for name, own in self.totals.items()}
        return Score(Tokens(words, words, ids, np.arange(len(words))), directions)


def test_ties_count_half_and_pairs_read_alike_are_ties():
    pairs = [Pair("a", "b", "x"), Pair("b", "a", "x"), Pair("a", "c", "x"), Pair("dunno", "whatever", "y")]
    found = minimal_pairs.judge(
        Fake({"forward": {"a": -1.0, "b": -2.0, "c": -1.0, "dunno": -5.0, "whatever": -1.0}}), pairs
    )
    assert found.credit["forward"].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert found.identical.tolist() == [False, False, False, True]
    rows, table = minimal_pairs.summary(pairs, {"trained": found}, "made")
    values = {row["metric"]: (row["n"], row["value"]) for row in rows}
    assert values == {
        "trained/forward/x": (3, 0.5),
        "trained/forward/y": (1, 0.5),
        "trained/forward/all": (4, 0.5),
        "trained/forward/mean over phenomena": (2, 0.5),
        "trained/identical": (4, 0.25),
    }
    assert {row["split"] for row in rows} == {"made"}
    assert table.title.startswith("Minimal pairs, made:")
    assert table.rows == [["x", 3, 0, 0.5], ["y", 1, 1, 0.5], ["all", 4, 1, 0.5]]


def test_a_model_that_reads_characters_tells_unknown_words_apart():
    fake = Fake({"forward": {"dunno": -5.0, "whatever": -1.0}})
    fake.reads_characters = True
    found = minimal_pairs.judge(fake, [Pair("dunno", "whatever", "y")])
    assert (found.credit["forward"].tolist(), found.identical.tolist()) == ([0.0], [False])


def test_two_towers_are_reported_each_and_together():
    totals = {"forward": {"a": -1.0, "b": -2.0}, "backward": {"a": -4.0, "b": -1.0}}
    found = minimal_pairs.judge(Fake(totals), [Pair("a", "b", "x")])
    assert {name: own.tolist() for name, own in found.credit.items()} == {
        "forward": [1.0],
        "backward": [0.0],
        "mean": [0.0],
    }


@pytest.mark.parametrize("name", ["lstm", "bert"])
def test_the_sum_over_pieces_of_a_real_model_decides(models, name):
    model = models[name]
    texts = [corpus.sentence("pairs", i) for i in range(6)]
    pairs = [Pair(good, bad, "x") for good, bad in zip(texts[::2], texts[1::2], strict=True)]
    found = minimal_pairs.judge(model, pairs)
    (name,) = found.credit
    assert name == ("masked" if model.direction == "full" else "forward")
    for pair, got in zip(pairs, found.credit[name], strict=True):
        good, bad = model.score([pair.good, pair.bad], within_words=True)
        assert got == float(good.total > bad.total)


def test_counts_of_words_are_right_in_half_of_the_generated_pairs():
    pairs = minimal_pairs.generated()
    assert pairs == minimal_pairs.generated()
    uids = Counter(pair.uid for pair in pairs)
    assert len(uids) == 10
    assert set(uids.values()) == {2 * minimal_pairs.GENERATED}
    weight = {
        word: len(word) + 0.01 * i for i, word in enumerate({w for p in pairs for w in p.good[:-1].lower().split()})
    }
    for uid in uids:
        own = [pair for pair in pairs if pair.uid == uid]
        good, bad = (Counter(" ".join(getattr(p, side)[:-1] for p in own).split()) for side in ("good", "bad"))
        assert good == bad
        assert len({pair.good for pair in own}) == len(own), "no sentence is asked about twice"
        # Any score that is a sum over single words, here an arbitrary one.
        right = [
            sum(weight[w] for w in p.good[:-1].lower().split()) > sum(weight[w] for w in p.bad[:-1].lower().split())
            for p in own
        ]
        assert np.mean(right) == 0.5
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert sum(a != b for a, b in zip(good, bad, strict=True)) == 1


def _line(**values):
    return json.dumps({"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "agreement"} | values)


def test_blimp_files_are_read_strictly(tmp_path):
    folder = tmp_path / "blimp"
    folder.mkdir()
    (folder / "b.jsonl").write_text(_line(field="syntax", linguistics_term="agreement", pairID="0") + "\n\n")
    (folder / "a.jsonl").write_text(json.dumps({"sentence_good": "Yes.", "sentence_bad": "Yess."}) + "\n")
    (folder / "readme.txt").write_text("not read")
    assert minimal_pairs.read([str(folder)]) == [
        Pair("Yes.", "Yess.", "a"),
        Pair("It is.", "It are.", "agreement", "agreement", "syntax"),
    ]
    path = tmp_path / "one.jsonl"
    for text, message in (
        (_line() + "\n{broken\n", "one.jsonl, line 2: not valid JSON"),
        (_line() + "\n[1]\n", "one.jsonl, line 2: a JSON list; an object is right"),
        (_line(sentence_bad=" "), "one.jsonl, line 1: sentence_bad is ' '; a sentence is right"),
        (json.dumps({"sentence_bad": "x"}), "line 1: sentence_good is 'missing'; a sentence is right"),
        (_line(sentence_bad="It is."), "line 1: both sentences are 'It is.'"),
        (_line(UID=7), "line 1: UID, linguistics_term and field must be text"),
        ("\n", "no pairs in it"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            minimal_pairs.read([str(path)])
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot be read"):
        minimal_pairs.read([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UserError, match=r"a .jsonl file"):
        minimal_pairs.read([str(folder / "readme.txt")])


def test_models_stand_beside_each_other():
    pairs = [Pair("a", "b", "x")]
    one, other = (
        Outcome({"forward": np.array([1.0])}, np.array([False])),
        Outcome({"forward": np.array([0.5])}, np.array([True])),
    )
    _, table = minimal_pairs.summary(pairs, {"trained": one, "random_init": other}, "made")
    assert table.columns == ["phenomenon", "pairs", "identical", "trained forward", "random_init forward"]
    assert table.rows[0] == ["x", 1, 0, 1.0, 0.5]
