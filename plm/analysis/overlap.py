"""How much of a task's text stands in the pretraining text, by runs of eight words.

Words are runs of letters and digits without case, so spacing and punctuation do not hide a copy. The task's runs are
hashed once (64 bits each); the pretraining text is read document by document and its words looked up in the task's own
vocabulary: a run with any other word cannot be one of the task's. So memory is that of the task's runs and of one block
of `BLOCK` words, however large the corpus. For a task of ten million runs and a corpus of ten billion words 0.005 false
hits are to be expected.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from plm.data.examples import COPIED_WORDS, Example, words

PRETRAINED = "pretrained_8_grams"  # metric of a run on a task: the share of it that its model was pretrained on
SHARE = "8_grams"  # metric of the suite `overlap`, measured of a pretrained model
FLAG = 0.01  # protocol 1: above this share a task's numbers are flagged wherever they stand
BLOCK = 1 << 20


def flag(share: float) -> str:
    """What stands behind a task or its number where this share of it was pretrained on."""
    return " FLAGGED" if share > FLAG else ""


def task_of(row: Mapping) -> str:
    """The task of which a row of results.jsonl says what share of its 8-grams its model was pretrained on; "" for any
    other row."""
    task, _, name = str(row.get("metric")).partition("/")
    return task if name == PRETRAINED or (row.get("suite"), name) == ("overlap", SHARE) else ""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """runs: of eight words in the distinct texts of a split; common: those that the pretraining text holds too.
    examples: of the split; touched: those with at least one common run."""

    runs: int
    common: int
    examples: int
    touched: int

    @property
    def share(self) -> float:
        """Of the runs; 0 for texts that are all shorter."""
        return self.common / self.runs if self.runs else 0.0

    @property
    def flagged(self) -> bool:
        return self.share > FLAG


def overlaps(
    splits: Mapping[str, Sequence[Example]], documents: Iterable[Sequence[str]], *, length: int = COPIED_WORDS
) -> dict[str, Overlap]:
    """{split: Overlap} of a task's splits with a text.

    documents: each the sentences of one document, in which runs may cross sentences.
    """
    vocabulary: dict[str, int] = {}
    hashed = {split: _Hashed(examples, vocabulary, length) for split, examples in splits.items()}
    wanted = np.unique(np.concatenate([one.runs for one in hashed.values()] or [np.empty(0, np.uint64)]))
    there = np.zeros(len(wanted), bool)
    for block in _blocks(documents, vocabulary):
        runs, _ = _runs(block, length)
        place = np.searchsorted(wanted, runs)
        place[place == len(wanted)] = 0
        if len(wanted):
            there[place[wanted[place] == runs]] = True
    common = wanted[there]
    return {split: one.compare(common) for split, one in hashed.items()}


class _Hashed:
    """The runs of a split: uint64, with the distinct text that each stands in, and the texts of each example."""

    def __init__(self, examples: Sequence[Example], vocabulary: dict[str, int], length: int):
        texts: dict[str, int] = {}
        self.of_example = [[texts.setdefault(t, len(texts)) for t in example.all_texts()] for example in examples]
        ids, self.n_texts = [], len(texts)
        text_of = []
        for number, text in enumerate(texts):
            own = [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
            ids += [*own, -1]
            text_of += [number] * (len(own) + 1)
        self.runs, starts = _runs(np.array(ids, np.int64), length)
        self.text = np.array(text_of, np.int64)[starts]

    def compare(self, common: np.ndarray) -> Overlap:
        hit = np.isin(self.runs, common)
        hit_text = np.zeros(self.n_texts, bool)
        hit_text[self.text[hit]] = True
        touched = sum(any(hit_text[number] for number in own) for own in self.of_example)
        return Overlap(len(self.runs), int(hit.sum()), len(self.of_example), touched)


def _blocks(documents: Iterable[Sequence[str]], vocabulary: Mapping[str, int]) -> Iterator[np.ndarray]:
    """Ids of the documents' words, -1 for a word that no text of the task holds and behind each document."""
    block: list[int] = []
    for sentences in documents:
        for sentence in sentences:
            block += [vocabulary.get(word, -1) for word in words(sentence)]
        block.append(-1)
        if len(block) >= BLOCK:
            yield np.array(block, np.int64)
            block = []
    yield np.array(block, np.int64)


def _runs(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64 [n], starts int64 [n]) of all runs of that many ids without a -1 among them."""
    n = max(0, len(ids) - length + 1)
    value, whole = np.zeros(n, np.uint64), np.ones(n, bool)
    for place in range(length):
        part = ids[place : place + n]
        whole &= part >= 0
        value = _mixed(value + (part + 1).astype(np.uint64))
    starts = np.flatnonzero(whole)
    return value[starts], starts


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads every bit over all (the finalizer of MurmurHash3); wraps around."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
