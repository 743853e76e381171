"""plm.senses finds every occurrence, clusters what is planted, compares with static vectors and draws what it found."""

import csv
import gzip
import json

import numpy as np
import pytest
from fixtures import children, corpus
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from plm.analysis import senses
from plm.analysis.senses import Occurrence, Settings
from plm.data import static_vectors
from plm.errors import UserError
from plm.inference.model import save
from plm.reporting import sense_picture

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def text(tmp_path):
    return corpus.write(tmp_path / "text.txt", 30)


def test_every_occurrence_is_found_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The bank, he said.\n\nThe bank, he said.\nBank “BANK” banks\nno\n", "utf-8")
    found, total, counts = senses.find(str(path), "Bank", 10)
    assert [(one.line, one.position) for one in found] == [(1, 1), (4, 0), (4, 1)]
    assert total == 3
    assert counts["bank"] == 4
    path.write_text("".join(f"a bank {i}\n" for i in range(50)))
    some, total, _ = senses.find(str(path), "bank", 7)
    assert (len(some), total) == (7, 50)
    assert [one.line for one in some] == sorted(one.line for one in some)
    path.write_text("".join(f"a bank {i}\n" for i in reversed(range(50))))
    assert {one.words for one in senses.find(str(path), "bank", 7)[0]} == {one.words for one in some}


def test_a_words_vector_is_that_of_its_own_pieces(models):
    for name in ("bert", "gpt", "elmo"):
        model = models[name]
        one = Occurrence(("Mo", '"zanu,', "zazu"), 1, 1)
        (vector,) = senses.contextual(model, [one], -1)
        (tokens,), (vectors,) = (
            model.tokenize([" ".join(one.words)]),
            model.embed([" ".join(one.words)], -1, "subwords"),
        )
        whole, alone = np.flatnonzero(tokens.word == 1), len(model.tokenize(["zanu"])[0])
        # One piece for each mark; GPT's vocabulary has no quotation mark, but it is a piece there too.
        assert len(whole) == alone + 2
        assert np.abs(vector - vectors[whole[1:-1]].mean(axis=0)).max() < 1e-5


def planted(n: int = 20):
    """Three groups of occurrences with a word and a direction each."""
    rng = np.random.default_rng(0)
    groups = [group for group, size in enumerate((n, 2 * n, n)) for _ in range(size)]
    vectors = senses.unit(rng.normal(0, 0.15, (len(groups), 16)) + np.eye(16)[groups])
    words = ("river", "money", "data")
    occurrences = [Occurrence(("the", words[g], "bank", "of", str(i)), 2, i // 2 + 1) for i, g in enumerate(groups)]
    return occurrences, vectors, np.array(groups)


def test_planted_groups_are_found_and_described():
    occurrences, vectors, groups = planted()
    labels, silhouettes = senses.cluster(vectors, Settings())
    assert max(silhouettes, key=silhouettes.get) == 3
    assert np.bincount(labels).tolist() == [40, 20, 20]
    assert len({(a, b) for a, b in zip(groups, labels, strict=True)}) == 3
    assert senses.telling_words(occurrences, labels, 3)[0][0] == "money"
    near = senses.nearest(vectors, occurrences, 3)
    for index, found in enumerate(near):
        lines = [occurrences[j].line for j, _ in found]
        assert occurrences[index].line not in lines
        allowed = [j for j, one in enumerate(occurrences) if one.line != occurrences[index].line]
        assert found[0][0] == max(allowed, key=lambda j: vectors[index] @ vectors[j])
    noise = senses.unit(np.random.default_rng(1).normal(size=(60, 64)))
    assert senses.cluster(noise, Settings())[0].max() == 0, "no clusters in noise"
    assert senses.cluster(noise, Settings(clusters=4))[0].max() == 3
    for projection in ("pca", "tsne"):
        points, _ = senses.project(vectors, Settings(projection=projection))
        assert points.shape == (80, 2)


def test_few_occurrences(models, tmp_path):
    path = tmp_path / "text.txt"
    for n, text in enumerate(("zanu mo ra\n", "zanu mo\nra zanu\n", "zanu zanu\n", "zanu mo\n" * 3)):
        path.write_text(text)
        found = senses.analyse(models["bert"], "zanu", str(path), Settings())
        assert len(found["clusters"]) == 1
        senses.write(found, tmp_path / str(n), lambda line: None)


def test_the_files_say_the_same(models, text, tmp_path):
    found = senses.analyse(models["bert"], "zanu", str(text), Settings(clusters=3))
    senses.write(found, tmp_path / "out", lambda line: None)
    assert found == json.loads((tmp_path / "out" / "senses.json").read_text())
    with open(tmp_path / "out" / "occurrences.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["occurrences"]) == found["occurrences_in_text"]
    source = text.read_text().splitlines()
    for row, one in zip(rows, found["occurrences"], strict=True):
        assert source[one["line"] - 1] == one["text"]
        assert senses.bare(one["text"].split()[one["position"]]) == "zanu" == senses.bare(row["word"])
    table = (tmp_path / "out" / "senses.md").read_text()
    assert table.count("\n| A |") == 1 + found["settings"]["examples"]
    assert "input embedding" in table
    nearest = [word for word, _ in found["static"]["nearest"]]
    assert "zanu" not in nearest
    assert (tmp_path / "out" / "senses.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "out" / "senses.svg").read_text()
    again = senses.analyse(models["bert"], "zanu", str(text), Settings(clusters=3))
    assert again == found


def test_contexts_in_the_picture_do_not_overlap(tmp_path):
    _, vectors, _ = planted()
    labels, _ = senses.cluster(vectors, Settings())
    points, axes = senses.project(vectors, Settings())
    found = {
        "word": "bank",
        "layer": 2,
        "axes": axes,
        "clusters": [
            {"size": int((labels == k).sum()), "telling_words": ["x"], "central": np.flatnonzero(labels == k).tolist()}
            for k in range(3)
        ],
        "occurrences": [
            {"point": p.tolist(), "cluster": int(k), "context": [f"{i} " + "left side " * 6, "bank", "right side " * 6]}
            for i, (p, k) in enumerate(zip(points, labels, strict=True))
        ],
    }
    drawn, seen = sense_picture.Canvas.savefig, []

    def looked_at(canvas, *arguments, **options):
        drawn(canvas, *arguments, **options)
        if options["format"] != "png":  # which leaves places for another resolution behind
            return
        (axis,) = canvas.axes
        # The words alone: an annotation's own extent has its line in it.
        extents = [Text.get_window_extent(one, FigureCanvasAgg(canvas).get_renderer()) for one in axis.texts]
        for number, box in enumerate(extents):
            assert canvas.bbox.x0 <= box.x0
            assert box.x1 <= canvas.bbox.x1
            assert not any(box.overlaps(other) for other in extents[number + 1 :])
        seen.append(len(extents))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sense_picture.Canvas, "savefig", looked_at)
        sense_picture.draw(found, tmp_path)
    assert seen[0] == sense_picture.LABELS


def test_static_vectors_from_files(models, text, tmp_path):
    gensim = pytest.importorskip("gensim", reason="the optional extra `static` is not installed")
    rng = np.random.default_rng(0)
    words = [
        "zanu",
        "ramo",
        "zaza",
        "never",
        *(corpus.word(i) for i in range(40) if corpus.word(i) not in ("zanu", "ramo")),
    ]
    words = list(dict.fromkeys(words))
    rows = rng.normal(size=(len(words), 8)).astype(np.float32)
    rows[1] = rows[0] + 0.01
    glove = "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, rows, strict=True))
    (tmp_path / "glove.txt").write_text(glove)
    (tmp_path / "w2v.txt").write_text(f"{len(words)} 8\n{glove}")
    vectors = gensim.models.KeyedVectors(8)
    vectors.add_vectors(words, rows)
    vectors.save_word2vec_format(str(tmp_path / "w2v.bin"), binary=True)
    _, _, counts = senses.find(str(text), "zanu", 5)
    assert "ramo" in counts
    for name in ("glove.txt", "w2v.txt", "w2v.bin"):
        source, near = senses.static_neighbours(models["gpt"], "Zanu", counts, Settings(), str(tmp_path / name))
        assert source == name
        assert near[0][0] == "ramo"
        assert "never" not in [word for word, _ in near]
    (tmp_path / "bad.txt").write_text("zanu 1 2\nramo x\n")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(glove.encode())[:-20])
    (tmp_path / "plain.txt.gz").write_text(glove)
    for name, words in (
        ("bad.txt", "no GloVe or word2vec file"),
        ("torn.txt.gz", "no GloVe or word2vec file: Compressed file ended"),
        ("plain.txt.gz", "no GloVe or word2vec file: Not a gzipped file"),
        ("none.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            senses.static_neighbours(models["gpt"], "zanu", counts, Settings(), str(tmp_path / name))


def test_a_corpus_in_which_every_word_is_rare_has_no_vectors(tmp_path):
    pytest.importorskip("gensim", reason="the optional extra `static` is not installed")
    (tmp_path / "a.txt").write_text("every word once")
    with pytest.raises(UserError, match=r"word2vec:text:.*a\.txt: no word occurs 2 times"):
        static_vectors.read(f"word2vec:text:{tmp_path}/a.txt", "static=it")


def test_the_command_and_what_it_refuses(models, text, tmp_path):
    for word, words in (("nowhere", "'nowhere' does not occur"), ("two words", "one word"), ("!!", "one word")):
        with pytest.raises(UserError, match=words):
            senses.find(str(text), word, 5)
    with pytest.raises(UserError, match="most=1"):
        Settings(most=1)
    with pytest.raises(UserError, match=r"--output=.* can be no folder \(File exists\)"):
        senses.make_output(str(text))
    assert senses.make_output(str(tmp_path / "new" / "folder")).is_dir()
    with pytest.raises(UserError, match="at most 4"):
        senses.cluster(np.eye(4, dtype=np.float32), Settings(clusters=9))
    save(models["gpt"], tmp_path / "gpt")
    common = [f"--model={tmp_path / 'gpt'}", f"--input={text}", f"--output={tmp_path / 'out'}"]
    good = children.start("plm.senses", *common, "--word=Zanu", output=tmp_path / "good")
    bad = children.start("plm.senses", *common, "--word=nowhere", output=tmp_path / "bad")
    assert good.wait() == 0, good.text
    assert "| static (input embedding) | zanu |" in good.text
    assert bad.wait() == 2
    assert bad.text.strip() == f"error: the word 'nowhere' does not occur in {text}"
