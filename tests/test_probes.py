"""Linear probes find what a layer holds, weigh it in the mix, and agree with scikit-learn's; controls stand beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import corpus
from sklearn.linear_model import LogisticRegression

from plm.analysis import features, probes
from plm.analysis.probes import Settings
from plm.data import tasks
from plm.errors import UserError

SMALL = Settings(words=400, epochs=3, batch=32, chunk=128, learning_rates=(1e-2, 1e-1))


pytestmark = pytest.mark.usefixtures("quick_compiles")


def made(n, seed, *, shuffled=False):
    """Three layers of six features; only the second one knows the class, through noise and on a scale of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n).astype(np.int32)
    vectors = rng.standard_normal((3, n, 6)).astype(np.float32)
    vectors[1, :, :3] += 2 * np.eye(3, dtype=np.float32)[labels]
    vectors[1] = vectors[1] * 100 + 7
    return vectors, rng.permutation(labels) if shuffled else labels


def fitted(train, dev, test, settings=SMALL):
    score = lambda flat: float(np.mean(flat == dev[1]))  # noqa: E731
    return probes.fit(train, dev[0], test[0], 3, score, settings)


def test_probes_find_the_layer_and_agree_with_scikit_learn():
    train, dev, test = made(1000, 0), made(300, 1), made(500, 2)
    found = fitted(train, dev, test)
    accuracy = [float(np.mean(probe.predictions == test[1])) for probe in found]
    assert len(found) == 4
    assert max(accuracy[0], accuracy[2]) < 0.42
    reference = LogisticRegression(C=1e6).fit(train[0][1], train[1])
    assert accuracy[1] > reference.score(test[0][1], test[1]) - 0.02 > 0.75
    assert np.mean(found[1].predictions == reference.predict(test[0][1])) > 0.95
    # The mix learns where the class stands, whatever the scale of the layer.
    assert found[3].shares[1] > 0.5
    assert sum(found[3].shares) == pytest.approx(1)
    assert accuracy[3] > accuracy[1] - 0.1
    assert [probe.shares for probe in found[:3]] == [None] * 3
    again = fitted(train, dev, test)
    assert all(np.array_equal(a.predictions, b.predictions) for a, b in zip(found, again, strict=True))

    twin = fitted(made(1000, 0, shuffled=True), made(300, 1, shuffled=True), made(500, 2, shuffled=True))
    labels = made(500, 2, shuffled=True)[1]
    assert max(np.mean(probe.predictions == labels) for probe in twin) < 0.42


def test_what_selects_is_the_best_epoch_and_rate():
    """`selected` is the metric that predictions of the selecting part have; a rate of nothing is never chosen."""
    train, dev = made(300, 0), made(200, 1)
    found = fitted(train, dev, dev, Settings(epochs=2, batch=32, chunk=128, learning_rates=(0.0, 1e-1)))
    for probe in found:
        assert probe.selected == float(np.mean(probe.predictions == dev[1]))
    assert found[1].trial[0] == pytest.approx(1e-1)
    assert found[1].trial[1] in (1, 2)


def test_batches_that_only_fill_up_a_chunk_are_no_steps():
    """400 units are two steps an epoch, whether a chunk holds two batches or sixteen."""
    train, dev = made(400, 0), made(200, 1)
    settings = Settings(epochs=3, batch=256, chunk=512, learning_rates=(1e-3, 1e-2))
    exact = fitted(train, dev, dev, settings)
    filled = fitted(train, dev, dev, dataclasses.replace(settings, chunk=4096))
    for one, other in zip(exact, filled, strict=True):
        assert (one.selected, one.trial) == (other.selected, other.trial)
        assert np.array_equal(one.predictions, other.predictions)
    assert filled[-1].shares == pytest.approx(exact[-1].shares, abs=1e-6)


def test_the_rate_falls_to_nothing_at_the_end_of_the_last_epoch():
    """The steps of a program against a plain loop, with empty batches among them."""
    rates, steps = (1e-2, 1e-1), 4
    train, init = probes._train_program(rates, steps)
    vectors, labels = made(steps * 8, 0)
    shape = (steps, 8)
    params = {"weight": np.zeros((2, 4, 6, 3)), "bias": np.zeros((2, 4, 3)), "mix": np.zeros((2, 3))}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    moments = probes._moments(vectors, 8)
    x, y, weights = vectors.reshape(3, *shape, 6), labels.reshape(shape), np.ones(shape, np.float32)
    plain = [(params, init(params), jnp.zeros(()))]
    for step in range(steps):
        plain.append(train(plain[-1], moments, x[:, step : step + 1], y[step : step + 1], weights[step : step + 1]))
    empty = np.zeros((3, 5, 8, 6), np.float32), np.zeros((5, 8), np.int32), np.zeros((5, 8), np.float32)
    state = plain[0]
    for half in (slice(0, 2), slice(2, 4)):
        state = train(
            state,
            moments,
            np.concatenate([x[:, half], empty[0]], axis=1),
            np.concatenate([y[half], empty[1]]),
            np.concatenate([weights[half], empty[2]]),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, plain[-1])
    assert float(state[2]) == steps
    # Adam's first step is the rate itself: a quarter less of it at each later one.
    first = np.abs(plain[1][0]["bias"]).max(axis=(1, 2))
    assert first == pytest.approx(rates, rel=1e-3)
    after = train(state, moments, x[:, :1], y[:1], weights[:1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), after[0], state[0])


def test_words_take_their_last_piece_or_the_mean_of_both_ends(models):
    model = models["bert"]
    texts = [("mo", "Bakelimorabalizazu", "\x07", "ra"), (), ("zanuzanu",)]
    spans = [[(0, 1), (1, 2), (2, 3), (0, 4)], [], [(0, 1)]]
    found = dict(features.of_spans(model, texts, spans))
    pieces = model.embed([list(words) for words in texts], "all", "subwords")
    tokens = model.tokenize([list(words) for words in texts])
    long = np.flatnonzero(tokens[0].word == 1)
    assert len(long) > 2
    last, ends = found[0]
    assert np.abs(last[:, 1] - pieces[0][:, long[-1]]).max() < 1e-6
    assert np.abs(ends[:, 1] - (pieces[0][:, long[0]] + pieces[0][:, long[-1]]) / 2).max() < 1e-6
    assert np.abs(ends[:, 3] - (pieces[0][:, 0] + pieces[0][:, -1]) / 2).max() < 1e-6
    assert not found[0][:, :, 2].any(), "nothing is left of a control character"
    assert found[1].shape == (2, model.n_layers, 0, model.n_features)
    (mean,) = (vectors for index, vectors in features.of_texts(model, texts) if index == 2)
    assert np.abs(mean - pieces[2].mean(axis=1)).max() < 1e-6


def _conll(path, sentences):
    path.write_text("\n".join("".join(f"{word}\t{tag}\n" for word, tag in one) for one in sentences))


@pytest.fixture
def tagging(tmp_path):
    """Words that begin with a vowel's syllable or not: the embedding tells, and chance is the commoner class."""
    for split, n in (("train", 60), ("dev", 25), ("test", 25)):
        texts = [corpus.sentence(split, i).lower().rstrip(".").split() for i in range(n)]
        _conll(tmp_path / f"{split}.conll", [[(w, "N" if w[1] in "ae" else "V") for w in words] for words in texts])
    return tasks.load(f"custom,kind=tagging,name=toy,files={tmp_path},label=1")


def test_tags_are_probed_in_both_alignments_with_controls(models, tagging):
    model = models["lstm"]
    train, _, (split, reported) = probes.parts(tagging, SMALL)
    assert sum(len(example.words) for example in train) == pytest.approx(400, abs=60)
    told = []
    found = {"trained": probes.measure(model, tagging, SMALL, told.append)}
    assert sum(told) == probes.n_steps(tagging, SMALL)
    rows, (table, shares) = probes.summary(tagging, SMALL, found)
    values = {row["metric"]: row for row in rows}
    n = sum(len(example.words) for example in reported)
    assert all(row["split"] == split == "test" and row["n"] == n for row in rows)
    tags = [tag for example in reported for tag in example.label]
    commonest = np.bincount([tag for example in train for tag in example.label]).argmax()
    assert values["toy/majority/accuracy"]["value"] == pytest.approx(np.mean(np.array(tags) == commonest))
    # Every word of the corpus is in training, and its tag depends on nothing else.
    assert values["toy/word_majority/accuracy"]["value"] > 0.97
    names = ["embedding", *(f"layer {k}" for k in range(1, model.n_layers)), "mix"]
    for alignment in ("last", "first_and_last"):
        for name in names:
            assert f"toy/trained/{alignment}/{name}/accuracy" in values
        total = sum(values[f"toy/trained/{alignment}/share of {name}"]["value"] for name in names[:-1])
        assert total == pytest.approx(1)
    majority = values["toy/majority/accuracy"]["value"]
    assert values["toy/trained/first_and_last/embedding/accuracy"]["value"] > majority + 0.15
    assert len(table.rows) == 2 + 2 * len(names)
    assert len(shares.rows) == 2


def test_classes_are_probed_on_the_mean_of_a_text(models, tmp_path):
    for split, n in (("train", 150), ("dev", 40), ("test", 40)):
        lines = [(corpus.sentence(split, i).lower(), str(i % 2)) for i in range(n)]
        lines = [(text.replace("e", "a") if label == "1" else text, label) for text, label in lines]
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "".join("\t".join(line) + "\n" for line in lines))
    data = tasks.load(f"custom,name=vowels,files={tmp_path},text=text")
    rows, _ = probes.summary(data, SMALL, {"trained": probes.measure(models["bert"], data, SMALL)})
    values = {row["metric"]: row["value"] for row in rows}
    assert values["vowels/majority/accuracy"] == 0.5
    assert values["vowels/trained/mean/embedding/accuracy"] > 0.7


def test_other_tasks_are_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + "a\tb\t0\nc\td\t1\n" * 2)
    with pytest.raises(UserError, match="suite probes reads tagging and single, and task 'mrpc' is pair"):
        probes.check(tasks.load(f"mrpc,files={tmp_path}"))
