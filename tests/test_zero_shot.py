"""Zero-shot: each rule of the GPT paper against cases by hand, and against the scores of toy models."""

import dataclasses
import json

import numpy as np
import pytest
from fixtures import corpus

from plm.analysis import zero_shot
from plm.data import tasks
from plm.data.examples import Example
from plm.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compiles")


def single(texts, labels=None):
    labels = labels or [i % 2 for i in range(len(texts))]
    return [Example(str(i), (text,), label=label) for i, (text, label) in enumerate(zip(texts, labels, strict=True))]


@pytest.mark.parametrize("name", ["gpt", "towers", "bert"])
def test_sentiment_compares_the_two_words_after_very(models, name):
    model = models[name]
    examples = single([corpus.sentence("film", i) for i in range(4)])
    found = zero_shot.sentiment(model, examples)
    by_word = {}
    for word in ("negative", "positive"):
        scores = model.score([f"{example.texts[0]} very {word}" for example in examples], within_words=True)
        pieces = [(score.directions["masked" if name == "bert" else "forward"], score.tokens) for score in scores]
        by_word[word] = [values[tokens.word == len(tokens.words) - 1].sum() for values, tokens in pieces]
    assert found == pytest.approx(np.subtract(by_word["positive"], by_word["negative"]), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_the_answer_with_the_best_mean_wins(models, name):
    model = models[name]
    words = [corpus.word(i) for i in range(30)]
    # Longer than the model's 40 positions, so the answer is read in a window of its own.
    context = " ".join(words * 2)
    examples = [
        Example("0", (context, "which word?"), choices=("mo", "ra ti mo", "zanu")),
        Example("1", ("short",), choices=("keli keli", "mo")),
    ]
    found = zero_shot.answers(model, examples)
    whole = [(" ".join(e.texts), choice) for e in examples for choice in e.choices]
    means = []
    for (stem, _), score in zip(whole, model.score([" ".join(one) for one in whole], within_words=True), strict=True):
        own = score.tokens.word >= len(stem.split())
        means.append(score.directions["masked" if name == "bert" else "forward"][own].mean())
    assert found == [int(np.argmax(means[:3])), int(np.argmax(means[3:]))]


@pytest.mark.parametrize("name", ["gpt", "towers", "bert"])
def test_scores_from_a_word_on_are_those_of_the_whole(models, name):
    """What is not asked for is not run, and changes nothing of what is."""
    texts = [" ".join(corpus.word(i) for i in range(40)), "Mo zazu ra."]
    whole = models[name].score(texts, within_words=True)
    part = models[name].score(texts, within_words=True, from_word=[30, 1])
    for all_of_it, some, first in zip(whole, part, (30, 1), strict=True):
        later = some.tokens.word >= first
        for direction, values in some.directions.items():
            assert np.abs(values[later] - all_of_it.directions[direction][later]).max() < 1e-4
            assert (values[~later] == 0).all()
            assert (all_of_it.directions[direction][~later] != 0).any()


def test_the_threshold_has_the_best_correlation():
    scores = np.array([-5.0, -4.0, -3.0, -2.0, -1.0])
    assert zero_shot.best_threshold(scores, [0, 0, 1, 1, 1]) == -3.5
    assert zero_shot.best_threshold(scores, [0, 0, 1, 0, 1]) in (-3.5, -1.5)
    assert zero_shot.best_threshold(np.array([-1.0, -1.0]), [0, 1]) == -2.0, "one score for all: all are class 1"


def _write(folder, name, header, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))


def test_acceptability_is_selected_and_reported_on_two_halves(tmp_path, monkeypatch):
    """A model that finds the good sentences likelier, and one that finds nothing."""
    texts = [f"{'good' if i % 2 else 'bad'} sentence {i}" for i in range(40)]
    rows = [["x", str(i % 2), "", text] for i, text in enumerate(texts)]
    for name in ("train.tsv", "dev.tsv"):
        _write(tmp_path / "cola", name, rows[0], rows[1:])
    data = tasks.load(f"cola,files={tmp_path / 'cola'}")

    def scored(model, examples, done=lambda n: None):
        good = np.array([e.texts[0].startswith("good") for e in examples], float)
        return -9 + (good if model == "knows" else 0 * good)

    monkeypatch.setattr(zero_shot, "acceptability", scored)
    knows, nothing = zero_shot.measure("knows", data), zero_shot.measure("nothing", data)
    assert knows["matthews"] == knows["auc"] == knows["accuracy"] == 1.0
    assert (nothing["matthews"], nothing["auc"], nothing["said_1"]) == (0.0, 0.5, 1.0)
    rows, table = zero_shot.summary(data, {"trained": knows, "random_init": nothing})
    values = {row["metric"]: row for row in rows}
    assert values["cola/trained/matthews"]["split"] == "dev, second half"
    assert values["cola/chance/matthews"]["value"] == 0.0
    assert [row[0] for row in table.rows] == ["trained", "random_init", "chance"]


def test_chance_and_tasks_without_a_rule(tmp_path):
    questions = [
        [[f"line {i}"], [{"question": "q?", "choice": ["a", "b", "c"], "answer": "b"}], str(i)] for i in range(9)
    ]
    (tmp_path / "dream").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "dream" / f"{split}.json").write_text(json.dumps(questions))
    rows, _ = zero_shot.summary(tasks.load(f"dream,files={tmp_path / 'dream'}"), {})
    assert [(row["metric"], row["value"]) for row in rows] == [("dream/chance/accuracy", pytest.approx(1 / 3))]
    _write(tmp_path / "mrpc", "train.tsv", ["sentence1", "sentence2", "label"], [["a", "b", "0"], ["c", "d", "1"]])
    with pytest.raises(UserError, match="no rule for task 'mrpc'"):
        zero_shot.rule_of(tasks.load(f"mrpc,files={tmp_path / 'mrpc'}"))


def test_the_right_answer_is_found_in_real_dialogues(models, real_data):
    """DREAM's own examples go through the rule; a random toy is at chance."""
    data = tasks.load(f"dream,files={real_data / 'tasks' / 'dream'}")
    _, (split, report) = data.selection_and_report()
    some = [dataclasses.replace(e, texts=(e.texts[0][:100], e.texts[1])) for e in report[:40]]
    found = zero_shot.answers(models["gpt"], some)
    assert split == "test"
    assert 0.1 < np.mean([choice == e.label for choice, e in zip(found, some, strict=True)]) < 0.6
