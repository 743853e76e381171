"""Vectors of texts and of whole files: windows, mixes and states as stated; killed and continued is uninterrupted."""

import dataclasses
import gzip
import json
import os
import re
import signal
import time

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import children, corpus
from fixtures.models import one_piece
from safetensors.numpy import load_file

from plm.data import reading
from plm.embed import parse_layers
from plm.errors import UserError
from plm.inference import batches, embedding, model, vector_file
from plm.models.graph import build

TEXTS = ["Bakelimo ramose, bali!", "Mo zazu ra.", "keli " * 3 + "xyzzy"]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    """Toys compile far longer than they run; child processes find what others have compiled."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    before = children.quick_compiles()
    yield
    children.restore(before)
    patch.undo()


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """{name: a folder that `plm.load` reads}."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("elmo", "bert"):
        model.save(models[name], folder / name)
    return folder


# The object


def test_one_compile_for_each_shape(models):
    gpt = dataclasses.replace(models["gpt"], _shared={})
    word = one_piece(gpt)
    texts = [" ".join([word] * n) for n in (33, *range(1, 40), 40)]
    vectors = gpt.embed(texts)
    (program,) = (found for found in gpt._shared.values() if callable(found))
    shapes = {tuple(shape) for _, *shape in batches.batches([len(text.split()) for text in texts], 40)}
    assert program._cache_size() == len(shapes) <= 3
    for text, found in zip(texts, vectors, strict=True):
        # This model sees no future, so each text's vectors begin those of the longest one.
        assert np.abs(found - vectors[-1][: len(text.split())]).max() < 1e-4
    dataclasses.replace(gpt, params=jax.tree.map(np.zeros_like, gpt.params)).embed(texts)
    assert program._cache_size() == len(shapes), "a control runs the same programs"


def test_batches_hold_every_text_once_in_few_shapes():
    rng = np.random.default_rng(0)
    for lengths in ([1], [5000], [3] * 1000 + [300], rng.integers(1, 500, 4000), []):
        found, shapes = [], set()
        for indices, rows, width in batches.batches(lengths):
            assert 0 < len(indices) <= rows
            assert all(lengths[index] <= width for index in indices)
            found += indices
            shapes.add((rows, width))
        assert sorted(found) == list(range(len(lengths)))
        assert len(shapes) <= len({batches.bucket(n) for n in lengths}) + 1
    lengths = rng.integers(10, 60, 5000)
    padded = sum(rows * width for _, rows, width in batches.batches(lengths))
    assert padded < 1.3 * sum(lengths)


def test_specials_stand_at_the_ends(models):
    for name, framed in (("bert", 2), ("elmo", 2), ("gpt", 0)):
        for units in ("words", "subwords"):
            plain, framed_vectors = (models[name].embed(TEXTS, "all", units, specials=s) for s in (False, True))
            for a, b in zip(plain, framed_vectors, strict=True):
                assert b.shape[1] == a.shape[1] + framed
                assert np.abs(b[:, framed // 2 : b.shape[1] - framed // 2] - a).max() < 1e-5


def test_mixes(models):
    bert = models["bert"]
    layers = bert.embed(TEXTS, "all")
    for layer, mix, wanted in (
        ("all", "sum", lambda x: x.sum(0)),
        (slice(-2, None), "mean", lambda x: x[-2:].mean(0)),
        ([0, -1], "concat", lambda x: np.concatenate([x[0], x[-1]], -1)),
        ([1, 2], (0.25, -2), lambda x: 0.25 * x[1] - 2 * x[2]),
        ("all", "scalar", lambda x: x.mean(0)),
        ([0, 1], embedding.ScalarMix((0.0, np.log(3)), 2.0), lambda x: 2 * (0.25 * x[0] + 0.75 * x[1])),
        (-1, "sum", lambda x: x[-1]),
    ):
        for vectors, by_layer in zip(bert.embed(TEXTS, layer, mix=mix), layers, strict=True):
            assert np.abs(vectors - wanted(by_layer)).max() < 1e-5


@pytest.mark.parametrize("layer_norm", ["bilm", "allennlp"])
def test_elmos_layer_norms_count_the_markers_or_not(models, layer_norm):
    """Statistics over all positions and features of one text, whatever stands beside it in a batch."""
    elmo = models["elmo"]
    mix = embedding.ScalarMix((0.3, 0.1, -0.2), 1.5, layer_norm)
    shares = np.exp([0.3, 0.1, -0.2]) / np.exp([0.3, 0.1, -0.2]).sum()
    mixed = elmo.embed(TEXTS, "all", "subwords", mix=mix)
    whole = elmo.embed(TEXTS, "all", "subwords", specials=True)
    for found, layers in zip(mixed, whole, strict=True):
        counted = layers[:, 1:-1] if layer_norm == "bilm" else layers
        mean, deviation = counted.mean((1, 2), keepdims=True), counted.std((1, 2), keepdims=True)
        wanted = 1.5 * np.tensordot(shares, (layers - mean) / deviation, 1)[1:-1]
        assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize("sees_right", [True, False])
def test_each_piece_is_taken_from_the_window_with_most_context(sees_right):
    for n, room, stride in ((50, 40, 20), (100, 16, 5), (33, 32, 32), (31, 32, 8), (0, 8, 4)):
        found = reading.windows(0, n, room, stride, sees_right=sees_right)
        assert [place for w in found for place in range(w.first, w.last)] == list(range(n))
        starts = range(0, max(n - room, 0) + stride, stride) if n > room else [0]
        for place in range(n):

            def context(start, place=place, n=n, room=room):
                stop = min(start + room, n)
                if not start <= place < stop:
                    return -1
                left, right = place - start, stop - 1 - place
                return min(left, right) + 0.01 * (stop - start) if sees_right else left

            (window,) = (w for w in found if w.first <= place < w.last)
            assert context(window.start) == max(map(context, starts))
            assert window.stop - window.start <= room


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_long_texts_are_read_in_windows(models, name):
    """Each piece's vector is that of the window's own text alone."""
    loaded = models[name]
    word = one_piece(loaded)
    words = ["mo", word, "zazu", word, word, "ra"] * 25
    (vectors,) = loaded.embed([words], "all", "subwords")
    tokens = loaded.tokenize([words])[0]
    assert vectors.shape[1] == len(tokens) > 100
    framed = sum(map(len, loaded.frame))
    room = 40 - framed
    for window in reading.windows(0, len(tokens), room, room // 2, sees_right=name == "bert"):
        ids = [*loaded.frame[0], *tokens.ids[window.start : window.stop], *loaded.frame[1]]
        layers = jax.jit(lambda p, b: loaded.graph.bind(p)(b, {}, layers=True)[0]["layers"])(
            loaded.params, loaded.batch([ids], 1, 40, [])
        )
        at = framed // 2 - window.start
        wanted = np.asarray(layers)[:, 0, window.first + at : window.last + at]
        assert np.abs(vectors[:, window.first : window.last] - wanted).max() < 1e-4
    (narrow,) = loaded.embed([words], "all", "subwords", window=20, stride=6)
    assert narrow.shape == vectors.shape
    assert np.abs(narrow - vectors).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_fewer_positions_than_the_smallest_shape(models, name):
    """The smallest padded shape is 16 tokens wide; a model of 8 positions never gets so many."""
    like = models[name]
    config = like.config.copy_and_resolve_references()
    config.model.max_positions = 8
    graph = build(config, like.tokenizer.size, tuple(config.objectives), jnp.float32)
    params = jax.tree.map(lambda p: np.full(p.shape, 0.1, np.float32), graph.shapes())
    narrow = model.Model(config, like.tokenizer, graph, params, 0, "narrow")
    assert (narrow.n_layers, narrow.n_features) == (like.n_layers, like.n_features)
    words = ["mo", "ra"] * 9
    (vectors,) = narrow.embed([words], "all")
    assert vectors.shape == (like.n_layers, 18, like.n_features)
    assert np.isfinite(narrow.score([words])[0].total)


def test_states_go_on_from_text_to_text(models):
    elmo = models["elmo"]
    fresh = elmo.embed(TEXTS, "all")
    stateful = elmo.embed(TEXTS, "all", stateful=True)
    again = elmo.embed(TEXTS, "all", stateful=True)
    assert np.abs(stateful[0] - fresh[0]).max() < 1e-5
    assert np.abs(stateful[1] - fresh[1]).max() > 1e-3
    assert all(np.array_equal(a, b) for a, b in zip(stateful, again, strict=True))
    lstm = models["lstm"]
    # A tower that reads forward and has no frame reads two texts in order as it reads one.
    one = lstm.embed([TEXTS[1] + " " + TEXTS[2]], "all", "subwords")[0]
    two = lstm.embed([TEXTS[1], "", TEXTS[2]], "all", "subwords", stateful=True)
    assert np.abs(np.concatenate(two, axis=1) - one).max() < 1e-5
    for name in ("bert", "masked"):
        with pytest.raises(UserError, match="carries nothing"):
            models[name].embed(TEXTS, stateful=True)


def test_static_vectors_are_the_embedding_alone(models):
    elmo, gpt = models["elmo"], models["gpt"]
    assert np.abs(elmo.static(["keli", "xyzzy"])[1] - elmo.embed([["xyzzy"]], 0)[0][0, :8]).max() < 1e-5
    (tokens,) = gpt.tokenize([["bakelimo"]])
    rows = gpt.params["embedding"]["tokens"]["table"][tokens.ids]
    assert np.allclose(gpt.static(["bakelimo"])[0], rows.mean(0), atol=1e-6)


def test_what_embed_refuses(models):
    gpt, bert = models["gpt"], models["bert"]
    for call, words in (
        (lambda: gpt.embed(["keli"], window=41), "window=41 must be from 1 to 40"),
        (lambda: bert.embed(["keli"], window=2), "window=2 must be from 3"),
        (lambda: gpt.embed(["keli"], window=20, stride=21), "stride=21 must be from 1 to 20"),
        (lambda: models["elmo"].embed(["keli"], stride=2), "needs a window"),
        (lambda: gpt.embed(["keli"], "all", mix="max"), "mix='max'"),
        (lambda: gpt.embed(["keli"], "all", mix=(1, 2)), "each of the 3 layers"),
        (lambda: gpt.embed(["keli"], slice(5, 9)), "none of the layers"),
        (lambda: gpt.embed(["keli"], []), "names no layer"),
        (lambda: gpt.embed(["keli"], mix=embedding.ScalarMix(layer_norm="batch")), "layer_norm='batch'"),
    ):
        with pytest.raises(UserError, match=words):
            call()


# The command

EMBED = "plm.embed"


def run(tmp_path, *arguments, code=0, before=(), **environment) -> str:
    output = tmp_path / f"log{len(list(tmp_path.iterdir()))}"
    child = children.start(EMBED, *arguments, output=output, before=before, **environment)
    assert child.wait() == code, child.text
    return child.text


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    with h5py.File(path) as file:
        return {name: data[...] for name, data in file.items()}, json.loads(file.attrs["settings"])


def test_a_file_becomes_aligned_vectors(saved, models, tmp_path):
    documents = corpus.documents(4)
    odd = ["\u05e9\u05dc\u05d5\u05dd \U0001f600 keli", "\u200b", "   Mo\tzazu \u00a0 ra. "]
    lines = ["", *documents[0], "", "", *documents[1], *odd, " \t", *documents[2]]
    text = tmp_path / "text.txt.gz"
    text.write_bytes(gzip.compress("\n".join(lines).encode()))
    bert = models["bert"]
    run(tmp_path, f"--model={saved / 'bert'}", f"--input={text}", f"--output={tmp_path / 'a.h5'}", "--layers=-2:")
    arrays, _ = read(tmp_path / "a.h5")
    kept = [number for number, line in enumerate(lines) if line.strip()]
    assert arrays["lines"].tolist() == kept
    assert arrays["documents"].tolist() == [0, len(documents[0]), len(documents[0] + documents[1] + odd), len(kept)]
    wanted = bert.embed([lines[number] for number in kept], slice(-2, None))
    assert np.diff(arrays["sentences"]).tolist() == [x.shape[1] for x in wanted]
    for layer, name in enumerate(("layer_1", "layer_2")):
        assert arrays[name].dtype == np.float32
        assert np.abs(arrays[name] - np.concatenate([x[layer] for x in wanted])).max() < 1e-5
    found = [
        lines[kept[s]][a:b]
        for s in range(len(kept))
        for a, b in arrays["words"][slice(*arrays["sentences"][s : s + 2])]
    ]
    assert found == " ".join(lines).split()

    tensors = ["--units=subwords", "--specials", "--mix=sum", "--dtype=float16"]
    run(tmp_path, f"--model={saved / 'bert'}", f"--input={text}", f"--output={tmp_path / 'b.safetensors'}", *tensors)
    arrays = load_file(tmp_path / "b.safetensors")
    wanted = np.concatenate(bert.embed([lines[n] for n in kept], "all", "subwords", specials=True, mix="sum"))
    assert arrays["vectors"].dtype == np.float16
    assert np.abs(arrays["vectors"] - wanted).max() < 1e-2
    cls, sep = bert.frame[0][0], bert.frame[1][0]
    assert arrays["pieces"][0] == cls
    assert arrays["pieces"][-1] == sep
    assert ((arrays["words"][:, 0] == -1) == np.isin(arrays["pieces"], (cls, sep))).all()
    assert not any(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("name", "options"), [("bert", ["--layers=all"]), ("elmo", ["--stateful", "--mix=scalar"])])
def test_killed_and_continued_is_uninterrupted(saved, tmp_path, name, options):
    """At three moments, with SIGKILL; the files are equal byte for byte."""
    text = corpus.write(tmp_path / "text.txt", 60)
    common = [f"--model={saved / name}", f"--input={text}", "--chunk=300", *options]
    run(tmp_path, *common, f"--output={tmp_path / 'whole.h5'}")
    target = tmp_path / "killed.h5"
    mark = tmp_path / "killed.h5.partial" / "mark.json"
    kills = 0
    for at in (1, 5):
        child = children.start(EMBED, *common, f"--output={target}", output=tmp_path / f"killed{at}")
        until = time.monotonic() + 120
        while child.process.is_alive() and time.monotonic() < until:
            line = json.loads(mark.read_text())["line"] if mark.exists() else 0
            if line > at * 12:
                os.kill(child.process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1
    assert not target.exists()
    log = run(tmp_path, *common, f"--output={target}")
    assert "going on at line" in log
    assert target.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_states_are_per_document(saved, models, tmp_path):
    documents = corpus.documents(3)
    text = corpus.write(tmp_path / "text.txt", 3)
    for chunk in (1, 10_000):
        target = tmp_path / f"{chunk}.h5"
        run(
            tmp_path,
            f"--model={saved / 'elmo'}",
            f"--input={text}",
            f"--output={target}",
            "--stateful",
            f"--chunk={chunk}",
        )
        arrays, _ = read(target)
        wanted = [v for document in documents for v in models["elmo"].embed(document, stateful=True)]
        assert np.abs(arrays["layer_2"] - np.concatenate(wanted)).max() < 1e-5


def test_bad_input_is_one_line(saved, models, tmp_path):
    corpus.write(tmp_path / "text.txt", 3)
    files = {
        "empty": b"",
        "blank": b"\n \n\t\n",
        "nul": b"Keli mo.\nke\0li\n",
        "latin": "Keli m\u00f6.\n".encode("latin-1"),
        "long": b"keli\n" + b"keli " * 200_000 + b"\n",
        "torn.gz": gzip.compress(b"keli " * 1000)[:-20],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "foreign.h5").write_bytes(b"not hdf5")
    bert = models["bert"]

    def write(source, target="new.h5", layers=-1, **settings):
        stated = embedding.options(bert, layers, "words", "mean", False, None, None, None)
        job = vector_file.Job(stated, **settings)
        said = []
        target = vector_file.check_output(str(tmp_path / target))
        vector_file.write(bert, job, str(tmp_path / source), target, say=said.append)
        return said

    write("text.txt", "done.h5")
    assert "there already" in write("text.txt", "done.h5")[0]
    (tmp_path / "begun.h5.partial").mkdir()
    (tmp_path / "begun.h5.partial" / "settings.json").write_text("{}")
    for call, words in (
        (lambda: write("empty"), "holds no text"),
        (lambda: write("blank"), "holds no text"),
        (lambda: write("nul"), "line 2 has a NUL byte"),
        (lambda: write("latin"), "line 1: byte 7 of it is no UTF-8"),
        (lambda: write("long"), "line 2 is longer than 65,536 bytes"),
        (lambda: write("torn.gz"), "cannot be decompressed"),
        (lambda: write("none"), "there is no such file"),
        (lambda: write("text.txt", layers=7), "7 must be a number from"),
        (lambda: write("text.txt", stateful=True), "carries nothing|reads each text whole"),
        (lambda: write("text.txt", chunk=-1), "chunk=-1"),
        (lambda: write("text.txt", "new.txt"), "must end in .h5"),
        (lambda: write("text.txt", "no/new.h5"), "there is no folder"),
        (lambda: write("text.txt", "done.h5", layers=0), r"other settings \(layers: \[2\] there, \[0\] now\)"),
        (lambda: write("text.txt", "begun.h5"), "begun.h5.partial is there from other settings"),
        (lambda: write("text.txt", "foreign.h5"), "was not made by plm.embed"),
        (lambda: parse_layers("top"), "--layers='top'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:  # permissions say nothing to root
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        with pytest.raises(UserError, match=f"the folder {re.escape(str(tmp_path))} cannot be written"):
            vector_file.check_output(str(tmp_path / "new.h5"))
    common = [f"--model={saved / 'bert'}", f"--input={tmp_path / 'nul'}"]
    log = run(tmp_path, *common, f"--output={tmp_path / 'new.h5'}", code=2)
    assert log.startswith("error: ")
    assert len(log.strip().splitlines()) == 1
    assert "belongs to --mix=scalar" in run(tmp_path, *common, f"--output={tmp_path / 'new.h5'}", "--gamma=2", code=2)


def test_eight_devices_give_what_one_gives(saved, models, tmp_path):
    text = corpus.write(tmp_path / "text.txt", 12)
    for name in ("bert", "elmo"):
        output = f"--output={tmp_path / name}.h5"
        run(tmp_path, f"--model={saved / name}", f"--input={text}", output, devices=8)
        wanted = models[name].embed([line for line in text.read_text().splitlines() if line])
        assert np.abs(read(tmp_path / f"{name}.h5")[0]["layer_2"] - np.concatenate(wanted)).max() < 1e-5
