"""Examples as rows: frames of the papers, what is cut, alignment of words and spans, epochs, buckets, the cache."""

import json

import numpy as np
import pytest

from experiments import bert, finetune
from plm.analysis import task_results
from plm.data import pipeline, task_rows, tasks, tokenizers
from plm.data.task_rows import Frame, TaskRows, TaskSplit, with_task_tokens
from plm.errors import UserError

SENTENCES = ["alpha beta gamma delta epsilon zeta eta theta iota kappa", "one two three four five six seven"]
SETTINGS = {"seq_len": 16, "pairs": "joined", "choices": 2, "word_piece": "first", "question": 8, "stride": 4}
LAYOUT = {"buckets": (), "shuffled_labels": False}


@pytest.fixture(scope="module")
def vocabulary():
    return {kind: tokenizers.train(kind, 8 * SENTENCES, 300) for kind in ("wordpiece", "bpe", "byte_bpe", "words")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "cache"))


def task(tmp_path, rows, **settings):
    path = tmp_path / f"rows.{'jsonl' if settings.get('kind') != 'tagging' else 'conll'}"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return tasks.load("custom", files=f"train={path}+dev={path}", **settings)


def split_of(data, tokenizer, **settings) -> TaskSplit:
    return TaskSplit(data, "train", data.examples("train"), tokenizer, SETTINGS | settings, progress=False)


def rows_of(split, tokenizer, n=None, **options) -> dict:
    n = n or split.n_rows
    layout = TaskRows(split, tokenizer, seq_len=16, batch_size=n, seed=0, settings=LAYOUT | options, mode="eval")
    return layout.rows(0, range(n))


def text(tokenizer, batch, row) -> str:
    return " ".join(tokenizer.pieces(batch["tokens"][row, : batch["length"][row]]))


PAIRS = [{"a": "one two", "b": "three", "label": "x"}, {"a": "four", "b": "five six", "label": "y"}]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wordpiece", "[CLS] one two [SEP] three [SEP]"),
        ("bpe", "_start_ one</w> two</w> _delimiter_ three</w> _classify_"),
        ("words", "<S> one two </S> <S> three </S>"),
    ],
)
def test_two_texts_are_framed_as_in_the_paper(kind, expected, vocabulary, tmp_path):
    tokenizer = with_task_tokens(vocabulary[kind])
    split = split_of(task(tmp_path, PAIRS, kind="pair", text="a+b"), tokenizer)
    batch = rows_of(split, tokenizer)
    assert text(tokenizer, batch, 0) == expected
    second = expected.split().index(next(word for word in expected.split() if word.startswith("three")))
    begins = np.flatnonzero(batch["segments"][0])[0]
    assert begins == second
    assert batch["segments"][0].sum() == batch["length"][0] - begins
    np.testing.assert_array_equal(batch["labels"], [0, 1])
    np.testing.assert_array_equal(
        batch["next_tokens"][0, : batch["length"][0] - 1], batch["tokens"][0, 1:][: batch["length"][0] - 1]
    )
    assert batch["next_tokens"][0, batch["length"][0] - 1] == -1


def test_both_orders_and_apart_are_rows_of_one_example(vocabulary, tmp_path):
    tokenizer, data = vocabulary["wordpiece"], task(tmp_path, PAIRS, kind="pair", text="a+b")
    both, apart = (split_of(data, tokenizer, pairs=pairs) for pairs in ("both_orders", "apart"))
    assert (both.rows_per_item, apart.rows_per_item) == (2, 2)
    batch = rows_of(both, tokenizer)
    assert [text(tokenizer, batch, row) for row in (0, 1)] == [
        "[CLS] one two [SEP] three [SEP]",
        "[CLS] three [SEP] one two [SEP]",
    ]
    np.testing.assert_array_equal(batch["labels"], [0, 0, 1, 1])
    assert text(tokenizer, rows_of(apart, tokenizer), 3) == "[CLS] five six [SEP]"


def test_the_longer_text_is_cut_and_counted(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    long = {"a": " ".join(["one"] * 20), "b": " ".join(["two"] * 9), "label": "x"}
    split = split_of(task(tmp_path, [long, PAIRS[1]], kind="pair", text="a+b"), tokenizer)
    batch = rows_of(split, tokenizer)
    words = text(tokenizer, batch, 0).split()
    assert (words.count("one"), words.count("two")) == (7, 6)  # 13 = 16 - 3; of equal lengths the second loses
    assert split.n_cut == 1
    assert batch["length"].max() == 16


def test_of_a_choice_the_context_is_cut_and_missing_choices_are_empty_rows(vocabulary, tmp_path):
    tokenizer = with_task_tokens(vocabulary["bpe"])
    rows = [
        {"context": " ".join(["one"] * 30), "question": "two", "choices": ["three", "four five"], "label": 1},
        {"context": "six", "question": "two", "choices": ["three", "four", "five"], "label": 0},
    ]
    data = task(tmp_path, rows, kind="choice", text="context+question", label="label")
    with pytest.raises(UserError, match=r"line 2: 3 choices; objectives.choose.choices=2 must be as many"):
        split_of(data, tokenizer)
    batch = rows_of(split_of(data, tokenizer, choices=3), tokenizer)
    assert text(tokenizer, batch, 1).endswith("one</w> two</w> _delimiter_ four</w> five</w> _classify_")
    np.testing.assert_array_equal(batch["length"], [16, 16, 0, 6, 6, 6])
    np.testing.assert_array_equal(batch["labels"], [1, 1, 1, 0, 0, 0])


def test_tags_stand_at_the_first_or_the_last_piece_of_their_word(vocabulary, tmp_path):
    tokenizer = vocabulary["byte_bpe"]
    data = task(tmp_path, "alpha X\nzzz Y\nbeta X\n\none Y\n", kind="tagging", label="-1")
    sizes = [len(ids) for ids in tokenizer.encode_words([["alpha"], ["zzz"], ["beta"]])]
    assert sizes[1] > 1
    first, last = (rows_of(split_of(data, tokenizer, word_piece=p), tokenizer) for p in ("first", "last"))
    ends = 1 + np.cumsum(sizes)
    np.testing.assert_array_equal(first["tag_positions"][0, :3], ends - sizes)
    np.testing.assert_array_equal(last["tag_positions"][0, :3], ends - 1)
    np.testing.assert_array_equal(first["tags"][:, :4], [[0, 1, 0, -1], [1, -1, -1, -1]])


def test_a_long_sentence_is_tagged_in_rows_of_whole_words(vocabulary, tmp_path):
    tokenizer = vocabulary["byte_bpe"]
    words = ["alpha", "zzz", "beta", "zzzz", "one", "two", "zzz", "six", "alpha", "zz"]
    tags = ["X" if word.startswith("z") else "Y" for word in words]
    lines = [f"{word} {tag}" for word, tag in zip(words, tags, strict=True)]
    data = task(tmp_path, "\n".join([*lines, "", *lines[:2]]) + "\n", kind="tagging", label="-1")
    for piece in ("first", "last"):
        whole = split_of(data, tokenizer, word_piece=piece, seq_len=64)
        split = split_of(data, tokenizer, word_piece=piece)
        batch = rows_of(split, tokenizer)
        assert whole.n_items == split.n_examples == 2 < split.n_items
        assert split.arrays["item_example"].tolist() == [0] * (split.n_items - 1) + [1]
        # Each word once, in order, at the piece that stands for it in a row that holds all of the sentence.
        at = [
            batch["tokens"][row][batch["tag_positions"][row][batch["tags"][row] >= 0]]
            for row in range(len(batch["tags"]))
        ]
        np.testing.assert_array_equal(
            np.concatenate(at),
            whole.arrays["tokens"][whole.arrays["tag_positions"] + np.repeat([0, whole.lengths[0]], [10, 2])],
        )
        # The last row reaches back to words before its first tag, as far as whole words fill it.
        last = split.n_items - 2
        assert batch["tag_positions"][last, 0] > len(tokenizer.encode_words([[words[-1]]])[0])
        assert batch["length"][last] > 16 - max(len(tokenizer.encode_words([[word]])[0]) for word in words)
        found = task_results.answers(split, dict(enumerate(batch["tags"])))
        assert found == [example.label for example in split.examples]
        assert task_results.score(split, found)["accuracy"] == 1
    with pytest.raises(
        UserError, match=r"rows.conll, line 1: the word 'zzzz' is \d pieces, and a row of seq_len=4 holds 2"
    ):
        split_of(data, tokenizer, seq_len=4)


def test_target_words_in_context(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    row = {"sentence1": "one two", "sentence2": "two three", "start1": 4, "end1": 7, "start2": 0, "end2": 3}
    data = task(tmp_path, [row | {"label": "T"}, row | {"label": "F"}], kind="word", text="sentence1+sentence2")
    joined = rows_of(split_of(data, tokenizer), tokenizer)
    np.testing.assert_array_equal(joined["marked"][0], [2, 4])
    two = tokenizer.encode(["two"])[0][0]
    assert set(joined["tokens"][0, joined["marked"][0]].tolist()) == {two}
    apart = rows_of(split_of(data, tokenizer, pairs="apart"), tokenizer)
    np.testing.assert_array_equal(apart["marked"][:2], [[2], [1]])
    long = row | {"sentence1": "one " * 20 + "two", "start1": 80, "end1": 83, "label": "T"}
    data = task(tmp_path, [long, row | {"label": "F"}], kind="word", text="sentence1+sentence2")
    with pytest.raises(UserError, match="line 1: a target word lies behind the 16 tokens of a row"):
        split_of(data, tokenizer)


def test_windows_of_a_context_point_to_the_answer_or_to_nothing(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    context = "one two three four five six seven one two three four five six seven alpha"
    answer = {"text": "alpha", "answer_start": context.index("alpha")}
    paragraphs = [{"context": context, "qas": [{"id": "q", "question": "theta?", "answers": [answer]}]}]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "1", "data": [{"paragraphs": paragraphs}]}))
    data = tasks.load("custom", kind="span", files=f"train={path}+dev={path}")
    split = split_of(data, tokenizer)
    assert split.n_items > 1
    batch = rows_of(split, tokenizer)
    alpha = tokenizer.encode(["alpha"])[0][0]
    for item in range(split.n_items):
        start, end = batch["answers"][item]
        if alpha in batch["tokens"][item]:
            assert start == end
            assert batch["tokens"][item, start] == alpha
        else:
            assert (start, end) == (0, 0)
    places = split.arrays["piece_spans"]
    assert context[places[-1, 0] : places[-1, 1]] == "alpha"


def many(tmp_path, n=50):
    rng = np.random.default_rng(0)
    rows = [{"t": " ".join(["one"] * int(rng.integers(1, 12))), "label": str(i % 2)} for i in range(n)]
    return task(tmp_path, rows, kind="single", text="t")


def test_an_epoch_takes_every_item_once_in_batches_of_one_width(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    split = split_of(many(tmp_path), tokenizer)
    options = {"seq_len": 16, "batch_size": 8, "settings": LAYOUT | {"buckets": (4, 8)}, "mode": "train"}
    layout = TaskRows(split, tokenizer, seed=3, **options)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * layout.steps_per_epoch, (epoch + 1) * layout.steps_per_epoch)
        items = np.concatenate([layout.items(step) for step in steps])
        assert sorted(items[items >= 0]) == list(range(50))
        epochs.append(items.tolist())
        for step in steps:
            batch = layout.rows(step, range(8))
            width = batch["tokens"].shape[1]
            assert width in (4, 8, 16)
            assert width == next(w for w in (4, 8, 16) if w >= batch["length"].max())
            # Any slice is the same whatever process asks for it.
            part = layout.rows(step, range(3, 6))
            for name, array in part.items():
                np.testing.assert_array_equal(array, batch[name][3:6])
    assert epochs[0] != epochs[1]
    assert layout.report["items"] == 50
    assert layout.examples_per_epoch == 8 * layout.steps_per_epoch == 50 + layout.report["filled_up_rows"]
    with pytest.raises(UserError, match=r"data.task.buckets: 32 is longer than seq_len=16"):
        TaskRows(split, tokenizer, seed=3, **options | {"settings": LAYOUT | {"buckets": (32,)}})


def test_shuffled_labels_keep_their_counts(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    split = split_of(many(tmp_path), tokenizer)
    settings = LAYOUT | {"shuffled_labels": True}
    layout = TaskRows(split, tokenizer, seq_len=16, batch_size=4, seed=0, settings=settings, mode="train")
    shuffled = layout.arrays["labels"]
    assert sorted(shuffled) == sorted(split.arrays["labels"])
    assert (shuffled != split.arrays["labels"]).sum() > 10


def test_fractions_are_nested_and_no_other_rows_are_made(vocabulary, tmp_path):
    tokenizer = vocabulary["wordpiece"]
    config = finetune.get_config("custom,kind=single", source=bert.get_config("tiny"))
    many(tmp_path)
    path = tmp_path / "rows.jsonl"
    config.data.task.update({"files": f"train={path}+dev={path}", "text": "t", "label": "label"})

    def opened(share, held_out=1.0):
        config.data.task.fraction, config.data.task.held_out_fraction = share, held_out
        corpus = pipeline.open_task(config, inherited=tokenizer, progress=False)
        return [{example.id for example in split.examples} for split in (corpus.train, corpus.valid)], corpus

    parts = [opened(share) for share in (0.1, 0.5, 1.0)]
    trained = [train for (train, _), _ in parts]
    assert trained[0] < trained[1] < trained[2]
    assert [len(one) for one in trained] == [5, 25, 50]
    assert [corpus.train.n_examples for _, corpus in parts] == [5, 25, 50]
    assert all(len(valid) == 25 for (_, valid), _ in parts)  # the first half of a dev of 50

    (_, least), corpus = opened(0.1, 0.2)
    (_, more), _ = opened(0.1, 0.6)
    assert least < more < parts[0][0][1]
    assert (len(least), len(more), corpus.valid.n_examples) == (5, 15, 5)


def test_rows_are_tokenised_once(vocabulary, tmp_path, monkeypatch):
    tokenizer, data = vocabulary["wordpiece"], many(tmp_path)
    before = split_of(data, tokenizer).arrays
    monkeypatch.setattr(task_rows, "_make", lambda *_: pytest.fail("made again"))
    again = split_of(data, tokenizer).arrays
    assert before.keys() == again.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], again[name])


def test_marks_are_behind_all_words_and_never_read(vocabulary, tmp_path):
    tokenizer = vocabulary["bpe"]
    marked = with_task_tokens(tokenizer)
    assert marked.vocabulary[: tokenizer.size] == tokenizer.vocabulary
    assert marked.vocabulary[tokenizer.size :] == ("_start_", "_delimiter_", "_classify_")
    assert max(marked.encode(["_start_ one _classify_"])[0]) < tokenizer.size
    assert with_task_tokens(marked) is marked
    marked.save(tmp_path / "saved")
    again = tokenizers.Tokenizer.load(tmp_path / "saved")
    assert (again.fingerprint, again.roles) == (marked.fingerprint, marked.roles)
    assert Frame.of(again).end == tokenizer.size + 2
