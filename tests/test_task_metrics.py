"""Metrics, predictions files, span decoding and overlap against values worked out by hand, and SQuAD's own scores."""

import json
import math

import numpy as np
import pytest
from fixtures import corpus

from plm.analysis import overlap, suites, task_metrics
from plm.analysis.span_decoding import WindowLogits, decode, pairs
from plm.data import spans, tasks
from plm.data.examples import Answer, Example, Task
from plm.data.tokenizers import Tokenizer, train
from plm.errors import UserError


def labelled(*labels):
    return [Example(str(i), ("t",), label=label) for i, label in enumerate(labels)]


def asked(*answers):
    """Questions; each one's gold answers, as texts."""
    return [Example(str(i), ("q", "c"), answers=tuple(Answer(a, 0) for a in own)) for i, own in enumerate(answers)]


# --------------------------------------------------------------------------------------------------- classes and scores


def test_metrics_of_classes():
    gold = labelled(1, 1, 1, 0, 0, 0, 0, 0)
    predicted = [1, 1, 0, 1, 0, 0, 0, 0]  # 2 hits, 1 miss, 1 false alarm, 4 right rejections
    assert task_metrics.accuracy(gold, predicted) == 6 / 8
    assert task_metrics.f1_positive(gold, predicted, ("0", "1")) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert task_metrics.f1_macro(gold, predicted, ("0", "1")) == pytest.approx((4 / 6 + 8 / 10) / 2)
    assert task_metrics.matthews(gold, predicted) == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))
    assert (
        task_metrics.accuracy([Example("0", words=("a", "b"), label=(0, 1)), *labelled((2,))], [(0, 0), (2,)]) == 2 / 3
    )


def test_the_commonest_class_of_the_training_examples():
    assert task_metrics.majority(labelled(2, 0, 2, 1), labelled(0, 0, 2)) == [2, 2, 2]
    tagged = [Example(str(i), words=words, label=label) for i, (words, label) in enumerate(
        [(("a", "b", "c"), (1, 0, 0)), (("d",), (1,)), (("e", "f"), (0, 2))])]  # fmt: skip
    assert task_metrics.majority(tagged, tagged) == [(0, 0, 0), (0,), (0, 0)]
    assert task_metrics.majority(labelled(0.5, 0.5), labelled(0.5)) == [], "a similarity is no class"
    assert task_metrics.majority([], labelled(1)) == []


def test_correlations_and_degenerate_predictions():
    gold = labelled(0.0, 1.0, 2.5, 5.0)
    assert task_metrics.spearman(gold, [1.0, 4.0, 2.0, 9.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert task_metrics.spearman(gold, [0.1, 0.1, 0.2, 0.3]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))  # a tie
    x, y = np.array([0.0, 1.0, 2.5, 5.0]), np.array([1.0, 4.0, 2.0, 9.0])
    x, y = x - x.mean(), y - y.mean()
    assert task_metrics.pearson(gold, [1.0, 4.0, 2.0, 9.0]) == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    assert task_metrics.pearson(gold, [3.0] * 4) == task_metrics.spearman(gold, [3.0] * 4) == 0.0
    classes = labelled(0, 1, 1)
    assert task_metrics.matthews(classes, [0, 0, 0]) == 0.0
    assert task_metrics.f1_positive(classes, [0, 0, 0], ("0", "1")) == 0.0


TAGS = ("O", "B-person", "I-person", "B-creative-work", "I-creative-work")


def test_entities_are_right_as_a_whole_or_not_at_all():
    gold = [Example("0", words=tuple("abcdef"), label=(1, 2, 0, 3, 4, 0)), Example("1", words=("a",), label=(1,))]
    assert task_metrics.entity_f1(gold, [(1, 2, 0, 3, 4, 0), (1,)], TAGS) == 1.0
    # One of three is found, one has the wrong end, one is missed; so precision 1/2 and recall 1/3.
    assert task_metrics.entity_f1(gold, [(1, 2, 0, 3, 0, 0), (0,)], TAGS) == pytest.approx(0.4)
    # The same words as another type are wrong; an I- that continues nothing begins an entity, as conlleval counts.
    assert task_metrics.entity_f1(gold, [(2, 2, 0, 1, 2, 0), (1,)], TAGS) == pytest.approx(2 / 3)
    assert task_metrics.entity_f1(gold, [(0,) * 6, (0,)], TAGS) == 0.0


def test_the_task_names_its_metrics():
    task = Task("x", "single", ("matthews", "accuracy"), ())
    assert list(task_metrics.score(task, labelled(0, 1), [0, 1])) == ["matthews", "accuracy"]
    with pytest.raises(UserError, match="metric 'bleu' is not known: accuracy, "):
        task_metrics.score(Task("x", "single", ("bleu",), ()), labelled(0, 1), [0, 1])
    with pytest.raises(UserError, match="f1_positive needs two classes, not 3"):
        task_metrics.f1_positive(labelled(0, 1), [0, 1], ("a", "b", "c"))
    with pytest.raises(ValueError, match="1 predictions for 2"):
        task_metrics.accuracy(labelled(0, 1), [0])
    for one in tasks.TASKS.values():
        assert set(one.metrics) <= set(task_metrics.METRICS), one.name


# ---------------------------------------------------------------------------------------------------------------- SQuAD


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a day", "apple day"),
        ("a.m.", "am"),
        ("U.S.-based theory", "usbased theory"),
        ("the", ""),
        ("“a” quote", "“ ” quote"),
    ],
)
def test_squad_normalisation(text, normal):
    assert task_metrics.normalized(text) == normal


def test_squad_scores_by_hand():
    gold = asked(["Denver Broncos", "The Denver Broncos of Colorado"], ["gold"], [], [])
    texts = ["Denver Broncos of", "silver", "", "anything"]
    assert task_metrics.squad_scores(gold[0], texts[0]) == (0.0, pytest.approx(2 * 3 / (3 + 4)))
    assert task_metrics.squad_scores(gold[0], "the denver broncos!") == (1.0, 1.0)
    assert task_metrics.exact_match(gold, texts) == 1 / 4
    assert task_metrics.f1(gold, texts) == pytest.approx((6 / 7 + 0 + 1 + 0) / 4)
    assert task_metrics.squad_scores(asked(["to be or to be"])[0], "to to to") == (0.0, pytest.approx(2 * 2 / (3 + 5)))


def test_null_threshold():
    gold = asked(["yes"], ["yes"], [], [])
    texts, odds = ["yes", "no", "x", "x"], [-3.0, -2.0, -1.0, 4.0]
    # Answering the first only: 1 + 0 + 1 + 1. A question is unanswered where its odds are above the threshold.
    assert task_metrics.best_null_threshold(gold, texts, odds) == (-3.0, 0.75)
    assert task_metrics.best_null_threshold(gold, ["no", "no", "x", "x"], odds) == (-math.inf, 0.5)
    assert task_metrics.best_null_threshold(gold[:2], ["yes", "yes"], [1.0, 1.0], "exact_match") == (1.0, 1.0)
    # Of equal odds all are answered or none.
    assert task_metrics.best_null_threshold(gold[1:3], ["yes", "x"], [1.0, 1.0]) == (-math.inf, 0.5)


@pytest.mark.real_data
def test_published_predictions_get_their_published_scores(real_data):
    folder = real_data / "oracles" / "squad_eval"
    data = tasks.load("squad", files=str(real_data / "tasks" / "squad_v1.1"))
    gold, lacking = data.examples("dev"), {"v1.1_logistic_regression": 13, "v1.1_match_lstm_ensemble": 0}
    for name, expected in json.loads((folder / "expected_scores.json").read_text()).items():
        path = folder / f"{name}.predictions.json"
        texts, missing = task_metrics.read_squad_predictions(path, gold)
        assert (len(gold), len(json.loads(path.read_text()))) == (expected["total"], expected["n_pred"])
        scores = task_metrics.score(data.task, gold, texts)
        assert 100 * scores["exact_match"] == pytest.approx(expected["exact_match"], abs=1e-9)
        assert 100 * scores["f1"] == pytest.approx(expected["f1"], abs=1e-9)
        assert len(missing) == lacking[name]


# ---------------------------------------------------------------------------------------------------- windows and texts


def test_windows_and_most_context_are_run_squads():
    assert spans.windows(10, 4, 3).tolist() == [[0, 4], [3, 7], [6, 10]]
    assert spans.windows(11, 4, 3).tolist() == [[0, 4], [3, 7], [6, 10], [9, 11]]
    assert spans.windows(4, 4, 3).tolist() == [[0, 4]]
    assert spans.windows(0, 4, 3).tolist() == [[0, 0]]
    assert spans.windows(9, 3, 5).tolist() == [[0, 3], [3, 6], [6, 9]], "no gap, however large the stride"
    # Piece 3 has 3 left and 0 right, then 0 and 3: equal, so the first. Piece 4: only the second. In [9, 11) the
    # shorter window has 0.02 for its length and the other one 0.04.
    assert spans.most_context(spans.windows(11, 4, 3), 11).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    # Official example: "the man went to the store and bought a gallon of milk", windows of 5 every 3.
    owner = spans.most_context(np.array([[0, 5], [3, 8], [6, 11]]), 11)
    assert owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_pieces_know_their_characters():
    text = "Zürich's Café, i.e. unaffable."
    words = spans.word_spans(text)
    assert [text[a:b] for a, b in words] == ["Zürich's", "Café,", "i.e.", "unaffable."]
    assert spans.word_spans("  ").shape == (0, 2)
    spelled = ["zu", "rich", "'", "s", "cafe", ",", "[UNK]", "un", "aff", "able", "."]
    found = spans.piece_spans(text, words, np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3]), spelled)
    assert [text[a:b] for a, b in found] == ["Zü", "rich", "'", "s", "Café", ",", "i.e.", "un", "aff", "able", "."]
    assert spans.answer_pieces(found, text.index("Café"), text.index("Café") + 4) == (4, 4)
    assert spans.answer_pieces(found, text.index("ffable"), text.index("ffable") + 6) == (8, 9)
    assert spans.answer_pieces(found, 1, 10) == (0, 4)
    window = np.array([4, 8])
    assert spans.positions(window, (4, 7), offset=10) == (10, 13)
    assert spans.positions(window, (4, 8), offset=10) == spans.positions(window, None, offset=10) == (0, 0)
    assert spans.positions(window, (3, 5), offset=10, null=2) == (2, 2)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "byte_bpe", "words"])
def test_pieces_of_every_tokenizer_cover_their_words(kind):
    texts = ["The Café's 3,000 naïve customers (mostly) don't pay—ever. " * 3, "Unaffable U.S. law"]
    tokenizer: Tokenizer = train(kind, texts, 400 if kind != "words" else 20)
    for text in texts:
        words = spans.word_spans(text)
        ids = tokenizer.encode([text[a:b] for a, b in words])
        word = np.repeat(np.arange(len(words)), list(map(len, ids)))
        flat = [i for own in ids for i in own]
        found = spans.piece_spans(text, words, word, spans.spelling(tokenizer, flat))
        assert (np.diff(found, axis=0) >= 0).all()
        assert all(words[w][0] <= a < b <= words[w][1] for (a, b), w in zip(found, word, strict=True))
        for start, stop in words:
            first, last = spans.answer_pieces(found, start, stop)
            assert (found[first, 0], found[last, 1]) == (start, stop)


# ------------------------------------------------------------------------------------------------------------- decoding

WORDS = ["one", "two", "three", "four", "five", "six"]
CONTEXT = " ".join(WORDS)
SPANS = spans.word_spans(CONTEXT)


def logits(window, offset, starts, ends, null=(0.0, 0.0), length=10):
    """Rows with -9 but where something is given, by piece of the context (or position "@n" of the row)."""
    arrays = []
    for given, at_null in ((starts, null[0]), (ends, null[1])):
        array = np.full(length, -9.0, np.float32)
        array[0] = at_null
        for piece, value in given.items():
            array[int(piece[1:]) if isinstance(piece, str) else piece - window[0] + offset] = value
        arrays.append(array)
    return WindowLogits(*arrays, window, offset)


def test_pairs_that_count():
    row = logits((0, 6), 3, {1: 5.0, 4: 4.0, "@2": 8.0}, {2: 3.0, 0: 7.0, 5: 1.0, "@9": 9.0})
    found = pairs(row, np.ones(6, bool), n_best=4, longest=3)
    # Position 2 is the question's and position 9 padding; 1..0 is backwards; 1..5 has five words.
    assert found[found[:, 2] > -4].tolist() == [[1.0, 2.0, 8.0], [4.0, 5.0, 5.0]]
    allowed = np.array([True, False, True, True, True, True])
    assert pairs(row, allowed, n_best=4, longest=3)[0].tolist() == [4.0, 5.0, 5.0]
    assert len(pairs(row, np.ones(6, bool), n_best=1)) == 0, "the best start and the best end are outside"


def test_the_best_pair_of_all_windows_is_sliced_out_of_the_context():
    rows = [
        logits((0, 4), 3, {1: 3.0, 3: 6.0}, {2: 2.0, 3: 5.0}, null=(2.0, 1.0)),
        logits((2, 6), 2, {3: 1.0, 4: 4.0}, {3: 9.0, 5: 4.0}, null=(1.0, 0.5)),
    ]
    owner = spans.most_context(np.array([[0, 4], [2, 6]]), 6)
    assert owner.tolist() == [0, 0, 0, 1, 1, 1]
    # 3..3 is best in both windows but piece 3 has more context in the second one: 1 + 9, not 6 + 5.
    decoded = decode(rows, CONTEXT, SPANS)
    assert (decoded.text, decoded.candidates[0].score) == ("four", 10.0)
    assert [c.text for c in decoded.candidates[:3]] == ["four", "two three four", "five six"]
    assert decoded.candidates[1].score == decoded.candidates[2].score == 8.0, "equal: the earlier window first"
    assert decoded.null_odds == pytest.approx(1.5 - 10.0), "the least null score of the windows"
    assert sum(c.probability for c in decoded.candidates) == pytest.approx(1.0)
    assert decoded.candidates[1].probability / decoded.candidates[0].probability == pytest.approx(math.exp(-2))
    assert len({c.text for c in decoded.candidates}) == len(decoded.candidates) <= 20
    assert len(decode(rows, CONTEXT, SPANS, n_best=2).candidates) == 2
    assert decode(rows, CONTEXT, SPANS, longest=1).text == "four"


def test_unanswerable_questions():
    row = logits((0, 6), 3, {1: 2.0}, {2: 2.0}, null=(3.0, 2.5))
    decoded = decode([row], CONTEXT, SPANS)
    assert (decoded.text, decoded.null_odds) == ("two three", 1.5)
    assert [decoded.answer(threshold) for threshold in (None, 0.0, 1.5, 1.4)] == ["two three", "", "two three", ""]
    empty = decode([logits((0, 6), 3, {"@1": 1.0}, {"@1": 1.0})], CONTEXT, SPANS, n_best=1)
    assert (empty.text, empty.null_odds, empty.candidates) == ("", math.inf, ())
    assert empty.answer(0.0) == ""


# ---------------------------------------------------------------------------------------------------- predictions files


def test_predictions_files_in_the_official_formats(tmp_path):
    glue, stsb, dream = tasks.TASKS["rte"], tasks.TASKS["stsb"], tasks.TASKS["dream"]
    two = labelled(None, None)
    assert (
        task_metrics.submission(glue, two, [1, 0], glue.labels)
        == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    )
    assert task_metrics.submission(stsb, two, [1.23456, 5]) == "index\tprediction\n0\t1.235\n1\t5.000\n"
    assert task_metrics.submission(dream, two[:1], [2]) == '{"id": "0", "prediction": 2}\n'
    squad, questions = tasks.TASKS["squad"], asked(["a"], ["é"])
    text = task_metrics.submission(squad, questions, ["a", "é"])
    (tmp_path / "p.json").write_text(text, "utf-8")
    assert task_metrics.read_squad_predictions(tmp_path / "p.json", questions) == (["a", "é"], [])
    (tmp_path / "p.json").write_text('["a"]')
    with pytest.raises(UserError, match=r"p.json: \{id: text\} would be right"):
        task_metrics.read_squad_predictions(tmp_path / "p.json", questions)
    wnut, sentences = (
        tasks.TASKS["wnut17"],
        [Example("0", words=("In", "Rome"), label=(0, 7)), Example("1", words=("x",), label=(0,))],
    )
    text = task_metrics.submission(wnut, sentences, [(0, 9), (0,)], wnut.labels)
    assert text == "In O O\nRome B-location B-person\n\nx O O\n\n"
    wic = tasks.TASKS["wic"]
    assert task_metrics.submission(wic, two, [1, 0], wic.labels) == "T\nF\n"
    found = json.loads(task_metrics.submission(tasks.TASKS["mclwic"], two, [1, 0], wic.labels))
    assert found == [{"id": "0", "tag": "T"}, {"id": "1", "tag": "F"}]


# -------------------------------------------------------------------------------------------------------------- overlap


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def test_overlap_by_hand(monkeypatch):
    splits = {
        "train": [Example("0", (words(*range(10)), "short text")), Example("1", (words(*range(20, 29)),))],
        "test": [Example("0", (words(*range(100, 110)),)), Example("1", ("too short",))],
    }
    corpus_text = [
        [
            words(*range(50, 60)),
            words(1, 2, 3).title() + ", " + words(4, 5, 6, 7, 8) + "!",
        ],  # case and marks do not hide
        [words(20, 21, 22, 23), words(24, 25, 26, 27)],  # across sentences
        [words(*range(100, 107))],
        [words(107)],  # never across documents
    ]
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(overlap, "BLOCK", block)
        found = overlap.overlaps(splits, corpus_text)
        assert found["train"] == overlap.Overlap(runs=3 + 2, common=2, examples=2, touched=2)
        assert found["test"] == overlap.Overlap(runs=3, common=0, examples=2, touched=0)
    assert (found["train"].share, found["train"].flagged, found["test"].flagged) == (0.4, True, False)
    assert overlap.overlaps({"dev": [Example("0", ("short",))]}, corpus_text)["dev"].share == 0.0


def test_overlap_agrees_with_counting_strings():
    draw = np.random.default_rng(0)
    documents = [[words(*draw.integers(0, 4, 30)) for _ in range(4)] for _ in range(50)]
    examples = [Example(str(i), (words(*draw.integers(0, 4, 12)),)) for i in range(60)]

    def runs(text):
        split = text.split()
        return [tuple(split[i : i + 8]) for i in range(len(split) - 7)]

    held = {run for sentences in documents for run in runs(" ".join(sentences))}
    hits = [[run in held for run in runs(e.texts[0])] for e in examples]
    found = overlap.overlaps({"dev": examples}, documents)["dev"]
    assert (found.common, found.runs) == (sum(map(sum, hits)), sum(map(len, hits)))
    assert found.touched == sum(map(any, hits))
    assert 0 < found.common < found.runs


class _Run:
    """What the suite reads of a run."""

    def __init__(self, documents):
        self.documents, self.read, self.facts = documents, 0, {}
        self.corpus = type("Corpus", (), {"meta": {"fingerprint": "f"}})

    def train_documents(self):
        self.read += 1
        return iter(self.documents)


def test_the_suite_flags_a_task_that_was_pretrained_on(tmp_path):
    texts = [s for d in corpus.documents(40) for s in d if len(s.split()) > 8]
    rows = "sentence\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    other = "sentence\tlabel\n" + "".join(f"{words(*range(i, i + 12))}\t{i % 2}\n" for i in range(30))
    (tmp_path / "train.tsv").write_text(rows)
    (tmp_path / "dev.tsv").write_text(other)
    data, run = tasks.load("sst2", files=str(tmp_path)), _Run(corpus.documents(60))
    suite = suites.SUITES["overlap"]
    for _ in range(2):
        outcome = suite.function(run, suite.settings, data)
        value = {(row["metric"], row["split"]): row["value"] for row in outcome.rows}
        assert value == {
            ("sst2/8_grams", "train"): 1,
            ("sst2/examples", "train"): 1,
            ("sst2/8_grams", "dev"): 0,
            ("sst2/examples", "dev"): 0,
        }
        assert outcome.note.endswith("train 100.00% FLAGGED, dev 0.00%")
    assert run.read == 1, "kept in the cache"
    with pytest.raises(UserError, match="suite 'overlap' is measured on tasks: --task=NAME"):
        suites.evaluate(type("Run", (), {"tasks": ()}), ["overlap"])
