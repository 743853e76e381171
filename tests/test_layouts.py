"""Layouts: batch = f(seed, step), nothing lost but what is reported, and each layout's own promise."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest

from plm.data.pretrain import make_layout
from plm.data.store import NpyWriter, Split
from plm.errors import UserError


class Ids:
    """A tokenizer as layouts see one."""

    def __init__(self, size, **roles):
        self.size, self.roles, self.special_ids = size, roles, np.array(sorted(roles.values()), np.int64)

    def role(self, name):
        if name not in self.roles:
            raise UserError(f"no {name} token")
        return self.roles[name]

    def character_rows(self, words=None):
        return np.zeros((self.size if words is None else len(words), 50), np.uint16)


FIRST = 10  # the first id that is a word, below are special tokens
PLAIN = Ids(100_000, eod=1, pad=2)
WORDS = Ids(100_000, bos=0, eos=1)
BERT = Ids(100_000, pad=0, cls=1, sep=2, mask=3)


def split_of(folder, documents, tokenizer, name="train"):
    """A split with these documents (lists of sentences, lists of ids)."""
    folder = folder / name
    folder.mkdir(parents=True)
    sentences = [sentence for document in documents for sentence in document]
    arrays = {
        "tokens": (np.uint32, np.concatenate([np.empty(0, int), *sentences])),
        "sentence_offsets": (np.int64, np.cumsum([0, *map(len, sentences)])),
        "document_offsets": (np.int64, np.cumsum([0, *map(len, documents)])),
        "extra_characters": (np.uint16, np.empty((0, 50))),
    }
    for key, (dtype, array) in arrays.items():
        with NpyWriter(folder / f"{key}.npy", dtype, array.shape[1:]) as writer:
            writer.append(array)
    tokens = len(arrays["tokens"][1])
    counts = dict.fromkeys(("bytes", "words", "unknown", "extra_words"), 0)
    counts |= {"tokens": tokens, "sentences": len(sentences), "documents": len(documents)}
    return Split(folder, counts, tokenizer)


def numbered(seed, n_documents, longest_document=12, longest_sentence=9):
    """Random documents in which every token of the corpus has an id of its own, counted from FIRST."""
    rng = np.random.default_rng(seed)
    next_id, documents = FIRST, []
    for _ in range(n_documents):
        document = []
        for _ in range(rng.integers(1, longest_document + 1)):
            length = int(rng.integers(1, longest_sentence + 1))
            document.append(list(range(next_id, next_id + length)))
            next_id += length
        documents.append(document)
    return documents, next_id - FIRST


def layout_of(name, split, tokenizer, *, T=8, B=4, seed=0, mode="train", **settings):
    return make_layout(name, split, tokenizer, seq_len=T, batch_size=B, seed=seed, settings=settings, mode=mode)


def batch_of(layout, step):
    return layout.rows(step, range(layout.batch_size))


def examples_of(layout, first, last):
    """Rows first .. last - 1 of all examples in a row, whatever batches they lie in."""
    B = layout.batch_size
    batches = [batch_of(layout, step) for step in range(first // B, -(-last // B))]
    return {key: np.concatenate([b[key] for b in batches])[first % B :][: last - first] for key in batches[0]}


def stream_pairs(documents, tokenizer):
    """All (input, target) pairs of the forward stream, the slow way."""
    if "bos" in tokenizer.roles:
        pairs = []
        for sentence in (s for d in documents for s in d):
            pairs += zip([tokenizer.roles["bos"], *sentence], [*sentence, tokenizer.roles["eos"]], strict=True)
        return pairs
    symbols = []
    for document in documents:
        symbols += [token for sentence in document for token in sentence]
        symbols += [tokenizer.roles["eod"]] if "eod" in tokenizer.roles else []
    return list(itertools.pairwise(symbols))


def pairs_in(batch, suffix=""):
    inputs, targets = batch["tokens" + suffix], batch["next_tokens" + suffix]
    return list(zip(inputs[targets >= 0].tolist(), targets[targets >= 0].tolist(), strict=True))


KINDS = [("blocks", PLAIN), ("blocks", Ids(100_000)), ("lanes", PLAIN), ("lanes", WORDS), ("lanes", Ids(100_000))]


@pytest.mark.parametrize(("name", "tokenizer"), KINDS)
def test_an_epoch_has_every_pair_of_the_stream_once_but_the_reported_tail(tmp_path, name, tokenizer):
    documents, _ = numbered(0, 60)
    layout = layout_of(name, split_of(tmp_path, documents, tokenizer), tokenizer, T=7, B=3)
    all_pairs = stream_pairs(documents, tokenizer)
    per_epoch = layout.examples_per_epoch
    # Lanes finish whole runs, so their epochs only end together when the lanes share them evenly.
    if name == "lanes":
        per_turn = layout.report["block_windows"] * layout.batch_size
        assert per_epoch % layout.report["block_windows"] == 0
        turns = np.lcm(per_epoch, per_turn) // per_turn
        epochs, batch = np.lcm(per_epoch, per_turn) // per_epoch, examples_of(layout, 0, turns * per_turn)
    else:
        epochs, batch = 1, examples_of(layout, 2 * per_epoch, 3 * per_epoch)
    reverse = [(target, token) for token, target in all_pairs]
    for suffix, expected in (("", all_pairs), ("_backward", reverse)) if name == "lanes" else (("", all_pairs),):
        seen = pairs_in(batch, suffix)
        known = set(expected)
        assert set(seen) <= known
        if len(known) == len(expected):  # <S> w pairs and the like are unique, too
            assert max(np.unique(seen, axis=0, return_counts=True)[1]) <= epochs
        assert len(seen) == epochs * (len(expected) - layout.report["tail_tokens"])
    assert layout.report["tail_tokens"] < 2 * layout.seq_len * layout.report.get("block_windows", 1)
    assert layout.report["tail_tokens"] == len(all_pairs) - per_epoch * 7
    assert (batch["length"] == 7).all()


@pytest.mark.parametrize(("name", "tokenizer"), KINDS)
@pytest.mark.parametrize(("T", "B"), [(7, 3), (5, 64), (500, 2)])
def test_evaluation_counts_every_pair_exactly_once_in_each_direction(tmp_path, name, tokenizer, T, B):
    documents, _ = numbered(1, 25)
    split = split_of(tmp_path, documents, tokenizer)
    expected = sorted(stream_pairs(documents, tokenizer))
    for settings in ({"backward": "independent"}, {"backward": "shared"}) if name == "lanes" else ({},):
        layout = layout_of(name, split, tokenizer, T=T, B=B, mode="eval", **settings)
        batches = [batch_of(layout, step) for step in range(layout.steps)]
        assert sorted(pair for b in batches for pair in pairs_in(b)) == expected
        if name == "lanes":
            backward = sorted((target, token) for b in batches for token, target in pairs_in(b, "_backward"))
            assert backward == expected
        for batch in batches:
            padding = np.arange(T) >= batch["length"][:, None]
            assert ((batch["next_tokens"] < 0) == padding).all()
            assert batch["special"][padding].all()
            assert (batch["tokens"][padding] == tokenizer.roles.get("pad", 0)).all()
        examples = np.concatenate([b["example"] for b in batches])
        assert len(set(examples.tolist())) == len(examples)
        with pytest.raises(ValueError, match="outside the pass"):
            batch_of(layout, layout.steps)


ALL = [("blocks", PLAIN, {}), ("pairs", BERT, {"duplicates": 3})]
ALL += [("lanes", t, {"backward": b}) for t in (PLAIN, WORDS) for b in ("independent", "shared")]


@pytest.mark.parametrize(("name", "tokenizer", "settings"), ALL)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_any_range_of_rows_is_that_slice_of_the_batch(tmp_path, name, tokenizer, settings, mode):
    documents, _ = numbered(2, 40)
    split = split_of(tmp_path, documents, tokenizer)
    layout, again = (layout_of(name, split, tokenizer, T=16, B=6, mode=mode, **settings) for _ in range(2))
    for step in (0, 1, layout.steps - 1) if mode == "eval" else (0, 3, 1000):
        whole = batch_of(layout, step)
        for rows in (range(6), range(2, 3), range(1, 5), range(5, 6), range(3, 3)):
            part = again.rows(step, rows)
            assert part.keys() == whole.keys()
            for key in whole:
                np.testing.assert_array_equal(part[key], whole[key][rows.start : rows.stop], err_msg=key)
                assert part[key].dtype == whole[key].dtype == {"example": np.int64, "special": bool}.get(key, np.int32)
    with pytest.raises(ValueError, match="rows must be"):
        layout.rows(0, range(7))


@pytest.mark.parametrize(("name", "tokenizer", "settings"), ALL)
def test_seeds_and_epochs_have_orders_of_their_own(tmp_path, name, tokenizer, settings):
    documents, _ = numbered(3, 60)
    split = split_of(tmp_path, documents, tokenizer)
    layout, other = (layout_of(name, split, tokenizer, T=8, B=4, seed=seed, **settings) for seed in (0, 1))
    n = layout.examples_per_epoch
    first, second, foreign = (
        examples_of(each, e * n, (e + 1) * n) for each, e in ((layout, 0), (layout, 1), (other, 0))
    )
    assert (first["tokens"] != second["tokens"]).any()
    assert (first["tokens"] != foreign["tokens"]).any()
    if name == "pairs":  # the same pairs in another order; an id names its pair
        a, b = np.argsort(first["example"]), np.argsort(second["example"])
        assert (first["example"] != second["example"]).any()
        for key in first:
            np.testing.assert_array_equal(first[key][a], second[key][b], err_msg=key)
    if name == "blocks":  # the cut moves, and an id is the place of the window in the stream
        cuts = {int(examples_of(layout, e * n, e * n + 1)["example"][0] % 8) for e in range(60)}
        assert len(cuts) == 8
        stream = [pair[0] for pair in stream_pairs(documents, tokenizer)]
        for row, place in zip(second["tokens"].tolist(), second["example"].tolist(), strict=True):
            assert row == stream[place : place + 8]


def test_epochs_run_on_inside_a_batch(tmp_path):
    documents, n_tokens = numbered(4, 3)
    tokenizer = Ids(100_000)
    layout = layout_of("blocks", split_of(tmp_path, documents, tokenizer), tokenizer, T=5, B=64)
    n = layout.examples_per_epoch
    assert n < 64
    assert (n + 2) * 5 > n_tokens - 1
    blocks = batch_of(layout, 0)["example"] // 5
    for epoch in range(64 // n):
        assert len(set(blocks[epoch * n : (epoch + 1) * n].tolist())) == n


@pytest.mark.parametrize("tokenizer", [WORDS, PLAIN])
@pytest.mark.parametrize("backward", ["independent", "shared"])
def test_row_i_of_a_batch_continues_row_i_of_the_batch_before(tmp_path, tokenizer, backward):
    documents, _ = numbered(5, 200)
    split = split_of(tmp_path, documents, tokenizer)
    forward = set(stream_pairs(documents, tokenizer))
    settings = {"backward": backward, "block_windows": 4}
    layout = layout_of("lanes", split, tokenizer, T=6, B=3, **settings)
    held_out = layout_of("lanes", split, tokenizer, T=6, B=3, mode="eval", **settings)
    assert layout.report["block_windows"] == 4
    streams = ("", "_backward") if backward == "independent" else ("",)
    marks = {"": (WORDS.roles["eos"], WORDS.roles["bos"]), "_backward": (WORDS.roles["bos"], WORDS.roles["eos"])}
    for lanes, last in ((layout, 40), (held_out, held_out.steps)):
        jumps = 0
        for step in range(1, last):
            before, now = batch_of(lanes, step - 1), batch_of(lanes, step)
            for suffix in streams:
                expected, got = before["next_tokens" + suffix][:, -1], now["tokens" + suffix][:, 0]
                if tokenizer is WORDS:  # the end of a sentence is followed by the start of the next one
                    ends, starts = marks[suffix]
                    expected = np.where(expected == ends, starts, expected)
                there = now["length"] > 0
                if lanes is layout and step % 4 == 0:
                    jumps += int((expected != got).any())
                else:
                    np.testing.assert_array_equal(got[there], expected[there])
            if suffix == "" and backward == "shared" and lanes is layout:
                np.testing.assert_array_equal(now["tokens_backward"], now["next_tokens"][:, ::-1])
                np.testing.assert_array_equal(now["next_tokens_backward"], now["tokens"][:, ::-1])
        assert jumps or lanes is held_out
    # Inside a row, too, everything is in the stream's order.
    batch = batch_of(layout, 7)
    assert set(pairs_in(batch)) <= forward
    if backward == "independent":
        assert {(target, token) for token, target in pairs_in(batch, "_backward")} <= forward
        overlap = [np.intersect1d(f, b).size for f, b in zip(batch["tokens"], batch["tokens_backward"], strict=True)]
        assert sum(overlap) <= 12  # the directions are elsewhere (markers and chance aside)


def test_lanes_are_the_official_stream(tmp_path):
    """The batches of bilm-tf: forward `<S> UNK a <S>` -> `UNK a </S> a`, backward `</S> c b a` -> `c b a <S>`."""
    S, E, UNK, a, b, c = 0, 1, 2, 3, 4, 5
    tokenizer = Ids(6, bos=S, eos=E, unk=UNK)
    split = split_of(tmp_path, [[[UNK, a]], [[a, b, c]]], tokenizer, "valid")
    batch = batch_of(layout_of("lanes", split, tokenizer, T=4, B=1, mode="eval"), 0)
    assert batch["tokens"].tolist() == [[S, UNK, a, S]]
    assert batch["next_tokens"].tolist() == [[UNK, a, E, a]]
    assert batch["tokens_backward"].tolist() == [[E, c, b, a]]
    assert batch["next_tokens_backward"].tolist() == [[c, b, a, S]]


def test_words_outside_the_vocabulary_are_inputs_and_never_special(tmp_path):
    tokenizer = Ids(12, bos=10, eos=11)
    split = split_of(tmp_path, [[[3, 12, 40, 4]]], tokenizer)
    batch = batch_of(layout_of("lanes", split, tokenizer, T=5, B=1, mode="eval"), 0)
    assert batch["tokens"].tolist() == [[10, 3, 12, 40, 4]]
    assert batch["special"].tolist() == [[True, False, False, False, False]]


# Sentence pairs


def official_pairs(documents, T, short_probability, rng):
    """The published algorithm, sentence by sentence and token by token: yields (A, B, is random)."""
    room = T - 3
    for d, document in enumerate(documents):
        target = rng.randint(2, room) if rng.random() < short_probability else room
        chunk, i = [], 0
        while i < len(document):
            chunk.append(document[i])
            if i == len(document) - 1 or sum(map(len, chunk)) >= target:
                a_end = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
                a = list(itertools.chain(*chunk[:a_end]))
                is_random = len(chunk) == 1 or rng.random() < 0.5
                if is_random:
                    other = d
                    while other == d:
                        other = rng.randrange(len(documents))
                    b = []
                    for sentence in documents[other][rng.randrange(len(documents[other])) :]:
                        b = b + sentence
                        if len(b) >= target - len(a):
                            break
                    i -= len(chunk) - a_end
                else:
                    b = list(itertools.chain(*chunk[a_end:]))
                while len(a) + len(b) > room:
                    longer = a if len(a) > len(b) else b
                    longer.pop(0 if rng.random() < 0.5 else -1)
                yield a, b, is_random
                chunk = []
            i += 1


def sides(batch, tokenizer=BERT):
    """(A, B, label) of every row, after checking the frame around them."""
    for row in range(len(batch["tokens"])):
        length = int(batch["length"][row])
        tokens, segments = batch["tokens"][row], batch["segments"][row]
        ends = np.flatnonzero(tokens == tokenizer.roles["sep"])
        assert len(ends) == 2
        assert tokens[0] == tokenizer.roles["cls"]
        assert ends[1] == length - 1
        assert (tokens[length:] == tokenizer.roles["pad"]).all()
        assert (segments == ((np.arange(len(tokens)) > ends[0]) & (np.arange(len(tokens)) < length))).all()
        assert (batch["special"][row] == (tokens < FIRST)).all()
        np.testing.assert_array_equal(batch["next_tokens"][row, : length - 1], tokens[1:length])
        assert (batch["next_tokens"][row, length - 1 :] == -1).all()
        a, b = tokens[1 : ends[0]].tolist(), tokens[ends[0] + 1 : ends[1]].tolist()
        yield a, b, int(batch["next_sentence_labels"][row])


def test_pairs_are_contiguous_text_of_the_documents_that_the_label_says(tmp_path):
    documents, _ = numbered(6, 30, longest_document=15)
    owner = {token: d for d, document in enumerate(documents) for sentence in document for token in sentence}
    layout = layout_of("pairs", split_of(tmp_path, documents, BERT), BERT, T=24, duplicates=1)
    seen, missing, labels = [], 0, []
    for a, b, label in sides(examples_of(layout, 0, layout.examples_per_epoch)):
        assert len(a) >= 1
        assert len(b) >= 1
        assert len(a) + len(b) <= 21
        assert a == list(range(a[0], a[-1] + 1))
        assert b == list(range(b[0], b[-1] + 1))
        assert len({owner[token] for token in a}) == len({owner[token] for token in b}) == 1
        assert (owner[a[0]] == owner[b[0]]) == (label == 0)
        assert label == 1 or b[0] > a[-1]
        labels.append(label)
        seen += a if label else a + b
    # With one duplicate each sentence is an A or a real B once; put-back sentences come again, only cuts are lost.
    assert len(seen) == len(set(seen))
    missing = len(owner) - len(seen)
    assert 0 <= missing <= layout.report["cut_tokens"]
    report = layout.report
    assert (report["random"], report["examples"]) == (sum(labels), len(labels))
    assert report["tokens"] + report["padding_tokens"] == report["examples"] * 21
    # A pass over the text is as many tokens as it has, whatever an epoch is.
    many = layout_of("pairs", layout.split, BERT, T=24, duplicates=10)
    rows = sides(examples_of(many, 0, 10 * many.examples_per_epoch))
    read = np.cumsum([len(a) + len(b) for a, b, _ in rows])
    assert np.searchsorted(read, 20 * len(owner)) == pytest.approx(20 * many.examples_per_pass, rel=0.03)
    assert 10 < many.examples_per_epoch / many.examples_per_pass < 20  # the second texts come on top


def test_pairs_have_the_published_statistics(tmp_path):
    documents, _ = numbered(7, 120, longest_document=20)
    T, duplicates = 40, 20
    split = split_of(tmp_path, documents, BERT)
    layout = layout_of("pairs", split, BERT, T=T, duplicates=duplicates, short_sequence_probability=0.3)
    ours = list(sides(examples_of(layout, 0, layout.examples_per_epoch)))
    rng = random.Random(0)
    theirs = [pair for _ in range(duplicates) for pair in official_pairs(documents, T, 0.3, rng)]
    assert len(ours) == pytest.approx(len(theirs), rel=0.02)
    sentence_ends = {sentence[-1] for document in documents for sentence in document}
    sentence_starts = {sentence[0] for document in documents for sentence in document}
    for statistic in (
        lambda a, b, label: label,
        lambda a, b, label: len(a),
        lambda a, b, label: len(b),
        lambda a, b, label: len(a) + len(b) == T - 3,
        lambda a, b, label: len(a) + len(b) < 12,
        lambda a, b, label: a[0] in sentence_starts,  # not cut at the front
        lambda a, b, label: a[-1] in sentence_ends,
        lambda a, b, label: b[0] in sentence_starts,
        lambda a, b, label: b[-1] in sentence_ends,
        lambda a, b, label: not label and b[0] == a[-1] + 1,
    ):
        x, y = (np.array([statistic(*pair) for pair in pairs], float) for pairs in (ours, theirs))
        error = np.sqrt(x.var() / len(x) + y.var() / len(y))
        assert abs(x.mean() - y.mean()) < 4.5 * error
    # 50/50 where there is a choice; with a single sentence there is none.
    free = layout.report["examples"] - layout.report["single_sentence"]
    chosen = layout.report["random"] - layout.report["single_sentence"]
    assert abs(chosen / free - 0.5) < 4 * 0.5 / np.sqrt(free)
    short = layout.report["short_documents"] / (duplicates * len(documents))
    assert abs(short - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (duplicates * len(documents)))


def test_the_plan_of_pairs_is_kept_and_belongs_to_its_settings(tmp_path):
    documents, _ = numbered(8, 20)
    split = split_of(tmp_path, documents, BERT)

    def plans():
        return sorted(path.name for path in (split.directory / "plans").glob("*[0-9a-f]"))

    first = layout_of("pairs", split, BERT, T=16, duplicates=2)
    assert len(plans()) == 1
    (folder,) = (split.directory / "plans").glob("*[0-9a-f]")
    made = (folder / "starts.npy").stat().st_mtime_ns
    again = layout_of("pairs", split, BERT, T=16, duplicates=2)
    assert (folder / "starts.npy").stat().st_mtime_ns == made
    assert again.report == first.report
    layout_of("pairs", split, BERT, T=16, duplicates=2, seed=1)
    layout_of("pairs", split, BERT, T=20, duplicates=2)
    layout_of("pairs", split, BERT, T=16, duplicates=3)
    layout_of("pairs", split, BERT, T=16, duplicates=2, short_sequence_probability=0)
    assert len(plans()) == 5
    # Evaluation is the same pass for every seed.
    one, two = (layout_of("pairs", split, BERT, T=16, seed=seed, mode="eval") for seed in (5, 6))
    assert one.steps == two.steps == -(-one.examples_per_epoch // 4)
    ids = []
    for step in range(one.steps):
        a, b = batch_of(one, step), batch_of(two, step)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        real = a["length"] > 0
        ids += a["example"][real].tolist()
        assert a["special"][~real].all()
        assert (a["next_tokens"][~real] == -1).all()
    assert ids == list(range(one.examples_per_epoch))


# Bad input and extension


@pytest.mark.parametrize(
    ("name", "tokenizer", "arguments", "message"),
    [
        ("stripes", PLAIN, {}, "data.layout='stripes' must be one of blocks, lanes, pairs"),
        ("no_such_module:layout", PLAIN, {}, "no_such_module"),
        ("blocks", PLAIN, {"duplicates": 2}, "data.blocks.duplicates"),
        ("blocks", PLAIN, {"T": 5000}, "too few for one sequence of seq_len=5000"),
        ("lanes", PLAIN, {"T": 5000}, "too few for one sequence of seq_len=5000"),
        ("lanes", PLAIN, {"backward": "none"}, "data.lanes.backward='none' must be"),
        ("lanes", PLAIN, {"block_windows": 0}, "data.lanes.block_windows=0"),
        ("pairs", PLAIN, {}, "no cls token"),
        ("pairs", BERT, {"T": 4}, "seq_len=4 must be at least 5"),
        ("pairs", BERT, {"duplicates": 0}, "data.pairs.duplicates=0"),
        ("pairs", BERT, {"short_sequence_probability": 1.5}, "short_sequence_probability=1.5"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, name, tokenizer, arguments, message):
    split = split_of(tmp_path, numbered(9, 5)[0], tokenizer)
    with pytest.raises(UserError, match=message) as error:
        layout_of(name, split, tokenizer, **arguments)
    assert "\n" not in str(error.value)


def test_corpora_that_are_too_small_are_one_line(tmp_path):
    one = split_of(tmp_path, numbered(10, 1)[0], BERT)
    with pytest.raises(UserError, match="1 document, next-sentence pairs need 2"):
        layout_of("pairs", one, BERT, T=8)
    none = split_of(tmp_path, [], PLAIN, "valid")
    for name in ("blocks", "lanes", "pairs"):
        with pytest.raises(UserError, match="the valid split is empty"):
            layout_of(name, none, PLAIN, mode="eval")


def test_a_layout_from_outside_the_package(tmp_path):
    split = split_of(tmp_path, numbered(11, 5)[0], PLAIN)
    layout = layout_of(f"{__name__}:own_layout", split, PLAIN, stride=3)
    assert layout.made_from == (split, PLAIN, {"stride": 3}, 8, 4, 0, "train")


def own_layout(split, tokenizer, *, settings, seq_len, batch_size, seed, mode):
    return SimpleNamespace(made_from=(split, tokenizer, settings, seq_len, batch_size, seed, mode))
