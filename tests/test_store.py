"""The token store: the same arrays however it is built, whole or not there, in memory that does not grow."""

import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from plm.cache import cache_directory
from plm.data import pipeline, store, tokenizers
from plm.data.sources import Document, Shard, Source, split_of
from plm.errors import UserError


@dataclass
class Words:
    """Words between blanks, the most frequent ones numbered: word `w7` is id 7 + 2 below `size`, others are open."""

    size: int = 12
    kind = "words"

    def __post_init__(self):
        self.roles = {"unk": 0, "eos": 1}
        self.fingerprint = f"words {self.size}"

    def encode_open(self, sentences):
        outside, encoded = {}, []
        for sentence in sentences:
            ids = [int(word[1:]) + 2 for word in sentence.split()]
            for place, word in enumerate(sentence.split()):
                if ids[place] >= self.size:
                    ids[place] = self.size + outside.setdefault(word, len(outside))
            encoded.append(ids)
        return encoded, list(outside)

    def character_rows(self, words=None):
        words = [f"w{i - 2}" for i in range(self.size)] if words is None else words
        rows = np.full((len(words), 50), 260, np.uint16)
        for row, word in zip(rows, words, strict=True):
            row[: len(word)] = list(word.encode())
        return rows


def word_of(row):
    return bytes(row[row < 256].tolist()).decode()


@dataclass(frozen=True)
class Numbers(Shard):
    """Documents of random words; `log` counts its readings, a file named `die` kills the process that reads it."""

    seed: int
    n_documents: int
    words: int
    log: str
    bytes: int = 1000

    def documents(self):
        with open(self.log, "a") as file:
            file.write(f"{self.seed}\n")
        rng = np.random.default_rng(self.seed)
        for number in range(self.n_documents):
            if number == self.n_documents // 2 and (Path(self.log).parent / f"die{self.seed}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            lengths = rng.integers(0, 7, size=rng.integers(1, 6))
            sentences = (" ".join(f"w{i}" for i in rng.integers(0, self.words, size=length)) for length in lengths)
            yield Document(f"{self.seed}:{number}", tuple(sentences))


class Corpus(Source):
    licence = "CC0"

    def __init__(self, folder, shards=5, documents=30, words=20):
        self.spec, self.log = "numbers", str(folder / "log")
        self.sizes = (shards, documents, words)
        self.fingerprint = f"{self.spec} {self.sizes} {folder}"

    fingerprint = ""

    def shards(self):
        shards, documents, words = self.sizes
        return [Numbers(seed, documents, words, self.log) for seed in range(shards)]

    def readings(self):
        return sorted(map(int, Path(self.log).read_text().split()))


def check(built, corpus, tokenizer, valid_fraction):
    """Compares a store with the corpus, document by document and word by word."""
    expected = {"train": [], "valid": []}
    for shard in corpus.shards():
        for document in shard.documents():
            sentences = [sentence.split() for sentence in document.sentences if sentence]
            if sentences:
                expected[split_of(document, valid_fraction)].append(sentences)
    for name, documents in expected.items():
        split = getattr(built, name)
        rows = split.character_rows(np.asarray(split.tokens))
        words = [word_of(row) for row in rows]
        sentences = [words[a:b] for a, b in zip(split.sentence_offsets[:-1], split.sentence_offsets[1:], strict=True)]
        found = [sentences[a:b] for a, b in zip(split.document_offsets[:-1], split.document_offsets[1:], strict=True)]
        assert found == documents
        flat = [word for document in documents for sentence in document for word in sentence]
        known = {f"w{i}" for i in range(tokenizer.size - 2)}
        assert (split.tokens < tokenizer.size).tolist() == [word in known for word in flat]
        lines = [" ".join(sentence) for document in documents for sentence in document]
        assert split.n_documents == len(documents)
        assert split.n_sentences == len(lines)
        assert split.n_tokens == split.n_words == len(flat)
        assert split.n_bytes == sum(len(line) + 1 for line in lines) + len(documents)
        assert split.n_unknown == sum(word not in known for word in flat)
    return expected


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_store_is_the_corpus_in_order(tmp_path):
    corpus, tokenizer = Corpus(tmp_path), Words()
    built = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    expected = check(built, corpus, tokenizer, 0.3)
    assert expected["train"]
    assert expected["valid"]
    assert built.train.tokens.dtype == np.uint16
    assert not built.train.tokens.flags.writeable
    assert built.meta["licence"] == "CC0"
    assert built.meta["splits"]["valid"]["documents"] == built.valid.n_documents
    assert json.loads((built.directory / "meta.json").read_text()) == built.meta


@pytest.mark.parametrize("limit", [1, 3])
def test_words_outside_the_vocabulary_keep_their_letters_when_the_table_is_forgotten(tmp_path, monkeypatch, limit):
    corpus, tokenizer = Corpus(tmp_path, words=40), Words()
    whole = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    monkeypatch.setattr(store, "MAX_OPEN_WORDS", limit)
    monkeypatch.setattr(store, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(store, "COPY_ELEMENTS", 100)
    monkeypatch.setattr(store, "VERSION", -limit)
    bounded = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    check(bounded, corpus, tokenizer, 0.3)
    assert bounded.train.counts["extra_words"] > whole.train.counts["extra_words"]


def test_ids_beyond_two_bytes_get_four(tmp_path):
    corpus, tokenizer = Corpus(tmp_path, words=70_000), Words(size=65_530)
    built = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    assert built.train.tokens.dtype == np.uint32
    assert built.valid.tokens.dtype == np.uint32
    assert built.train.n_unknown > 0
    check(built, corpus, tokenizer, 0.3)


def test_processes_build_what_one_process_builds(tmp_path, monkeypatch):
    corpus, tokenizer = Corpus(tmp_path), Words()
    alone = contents(store.build(corpus, tokenizer, valid_fraction=0.3, workers=1).directory)
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "other"))
    together = contents(store.build(corpus, tokenizer, valid_fraction=0.3, workers=2).directory)
    assert corpus.readings() == sorted([*range(5), *range(5)])
    assert alone == together


def test_a_store_is_reused_and_belongs_to_its_corpus_tokenizer_and_split(tmp_path):
    corpus = Corpus(tmp_path)
    built = store.build(corpus, Words(), valid_fraction=0.3, workers=1)
    readings = corpus.readings()
    again = store.build(corpus, Words(), valid_fraction=0.3, workers=1)
    assert again.directory == built.directory
    assert corpus.readings() == readings
    others = [
        store.build(corpus, Words(size=13), valid_fraction=0.3, workers=1),
        store.build(corpus, Words(), valid_fraction=0.2, workers=1),
        store.build(corpus, Words(), valid_fraction=0.3, split="valid", workers=1),
        store.build(corpus, Words(), valid_fraction=0.3, split="train", workers=1),
        store.build(Corpus(tmp_path, words=21), Words(), valid_fraction=0.3, workers=1),
    ]
    assert len({s.fingerprint for s in [built, *others]}) == 6
    assert others[0].corpus_fingerprint == built.corpus_fingerprint
    assert len({s.corpus_fingerprint for s in [built, *others[1:]]}) == 5
    assert others[2].valid.n_tokens == others[3].train.n_tokens == built.train.n_tokens + built.valid.n_tokens
    assert others[2].train.n_documents == others[3].valid.n_documents == 0


def test_bytes_of_text_are_the_bytes_that_lossless_tokens_stand_for(tmp_path):
    lines = ["A naïve café.", "“Well?”  she said.", "One, two:\tthree!", "…"]
    (tmp_path / "corpus.txt").write_text("\n\n".join("\n".join(lines[: i % 4 + 1]) for i in range(40)), "utf-8")
    tokenizer = tokenizers.train("byte_bpe", lines * 20, 300)
    built = store.build(f"text:{tmp_path}/corpus.txt", tokenizer, valid_fraction=0.3, workers=1)
    total = 0
    for split in (built.train, built.valid):
        assert tokenizer.byte_lengths[split.tokens].sum() + split.n_documents == split.n_bytes
        total += split.n_bytes
    # The file, whose last line lacks its line break and the blank line after it.
    assert total == len((tmp_path / "corpus.txt").read_bytes()) + 2


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import Corpus, Words, store
if __name__ == "__main__":
    store.build(Corpus(Path({folder!r})), Words(), valid_fraction=0.3, workers={workers})
"""


def build_elsewhere(folder, workers):
    script = folder / f"build{workers}.py"
    script.write_text(BUILD.format(tests=str(Path(__file__).parent), folder=str(folder), workers=workers))
    return subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "cache"))
    corpus, tokenizer = Corpus(tmp_path), Words()
    (tmp_path / "die3").touch()
    killed = build_elsewhere(tmp_path, 1)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    folder = cache_directory() / "stores"
    assert [path.suffix for path in folder.iterdir() if path.is_dir()] == [".building"]
    assert corpus.readings() == [0, 1, 2, 3]
    (tmp_path / "die3").unlink()
    built = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    assert corpus.readings() == [0, 1, 2, 3, 3, 4]
    assert [path for path in folder.iterdir() if path.is_dir()] == [built.directory]
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "other"))
    assert contents(built.directory) == contents(
        store.build(corpus, tokenizer, valid_fraction=0.3, workers=1).directory
    )


def test_two_processes_that_want_one_store_build_it_once(tmp_path):
    running = [build_elsewhere(tmp_path, workers) for workers in (1, 2)]
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    corpus = Corpus(tmp_path)
    assert corpus.readings() == [0, 1, 2, 3, 4]
    check(store.build(corpus, Words(), valid_fraction=0.3), corpus, Words(), 0.3)


def test_processes_that_want_one_vocabulary_train_it_once():
    """The second one comes while the first one reads, and waits for it. Threads, whose locks are those of processes."""
    wanted = types.SimpleNamespace(kind="words", vocab=20, lowercase=False, pretokenized=False)
    made, reads = [], []

    @dataclass(frozen=True)
    class Only(Shard):
        bytes = 10

        def documents(self):
            yield Document("one", ("one two three one two",))

    class Slow(Source):
        spec = fingerprint = "slow"

        def shards(self):
            reads.append(threading.current_thread())
            if len(reads) == 1:
                second.start()
                second.join(0.3)
            return [Only()]

    def train():
        made.append(pipeline._trained_on(Slow(), wanted, 0.0, False).fingerprint)

    second = threading.Thread(target=train)
    train()
    second.join()
    assert len(reads) == 1
    assert made[0] == made[1]


def test_a_killed_worker_leaves_no_store_and_the_next_build_goes_on(tmp_path):
    (tmp_path / "die2").touch()
    process = build_elsewhere(tmp_path, 2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "UserError: one of the 2 processes that tokenise was ended from outside" in stderr
    (tmp_path / "die2").unlink()
    corpus = Corpus(tmp_path)
    check(store.build(corpus, Words(), valid_fraction=0.3, workers=1), corpus, Words(), 0.3)


def test_a_script_that_its_own_workers_would_start_again_is_refused(tmp_path):
    script = tmp_path / "unguarded.py"
    text = BUILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path), workers=2)
    script.write_text(text.replace("__name__", "True or __name__"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'put its work below if __name__ == "__main__":' in done.stderr
    assert "UserError: one of the 2 processes" in done.stderr


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-2]), Path.unlink])
def test_a_damaged_store_is_built_again(tmp_path, capsys, damage):
    corpus, tokenizer = Corpus(tmp_path), Words()
    built = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    before = contents(built.directory)
    damage(built.directory / "train" / "tokens.npy")
    again = store.build(corpus, tokenizer, valid_fraction=0.3, workers=1)
    assert "is damaged" in capsys.readouterr().err
    assert contents(again.directory) == before


def test_what_a_killed_build_left_beside_its_finished_store_is_removed(tmp_path):
    built = store.build(Corpus(tmp_path), Words(), valid_fraction=0.3, workers=1)
    left = built.directory.with_name(built.directory.name + ".building")
    (left / "parts").mkdir(parents=True)
    assert store.build(Corpus(tmp_path), Words(), valid_fraction=0.3, workers=1).directory == built.directory
    assert not left.exists()


def test_a_cache_that_cannot_be_entered_is_one_line(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(UserError, match=r"the cache cannot be written \(.*Permission denied.*set PLM_CACHE"):
        store.build(Corpus(tmp_path), Words(), valid_fraction=0.3, workers=1)


class Bytes(Words):
    """A fast tokenizer, a token a byte, that meets 1,000 words it has never met in each call."""

    calls = 0

    def encode_open(self, sentences):
        encoded, self.calls = list(map(list, map(str.encode, sentences))), self.calls + 1
        encoded.append(list(range(self.size, self.size + 1000)))
        sentences.append("1,000 words")
        return encoded, [f"{self.calls} {k}" for k in range(1000)]

    def character_rows(self, words=None):
        return np.zeros((self.size if words is None else len(words), 50), np.uint16)


@dataclass(frozen=True)
class Monotony(Shard):
    n_documents: int
    bytes: int = 0

    def documents(self):
        return (Document("again", (f"{number} " + "w1 " * 1000,) * 5) for number in range(self.n_documents))


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH_CHARACTERS", 1 << 16)
    monkeypatch.setattr(store, "MAX_OPEN_WORDS", 3000)
    monkeypatch.setattr(store, "COPY_ELEMENTS", 1 << 16)
    monkeypatch.setattr(Corpus, "shards", lambda self: [Monotony(self.sizes[1])])
    peaks = []
    for documents in (50, 250):  # 0.8 and 4 MB of text, 3 and 15 MB of parts
        tracemalloc.start()
        built = store.build(Corpus(tmp_path, documents=documents), Bytes(size=256), valid_fraction=0.3, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert built.train.n_tokens + built.valid.n_tokens > 3.5e6
    assert built.train.n_unknown > 10_000
    assert peaks[1] < 1.3 * peaks[0]


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    empty = Corpus(tmp_path, documents=0)
    Path(empty.log).touch()
    with pytest.raises(UserError, match="'numbers' holds no text"):
        store.build(empty, Words(), valid_fraction=0.3, workers=1)
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="valid_fraction"):
            store.build(Corpus(tmp_path), Words(), valid_fraction=fraction, workers=1)
    with pytest.raises(UserError, match=r"data\.workers"):
        store.build(Corpus(tmp_path), Words(), valid_fraction=0.3, workers=-1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="PLM_CACHE"):
        store.build(Corpus(tmp_path), Words(), valid_fraction=0.3, workers=1)


def test_invalid_text_found_by_a_worker_is_one_line_and_stops_the_others(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"w1 w2\n" + b"\xff" * (number == 2) + b"\n\nw3\n")
    with pytest.raises(UserError, match=r"2\.txt") as error:
        store.build(f"text:{tmp_path}/*.txt", Words(), valid_fraction=0.3, workers=2)
    assert "\n" not in str(error.value)
