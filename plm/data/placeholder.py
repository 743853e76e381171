"""A corpus that says nothing but has a real one's shapes: for planning a run before its text is there."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plm.data.pipeline import Corpus
from plm.data.store import Split
from plm.data.tasks import TASKS
from plm.data.tokenizers import SPECIALS, Tokenizer

DOCUMENTS, SENTENCES = 16, 8


def tokenizer(kind: str, size: int, *, lowercase: bool | None = None) -> Tokenizer:
    """A vocabulary of `size` entries with the special tokens of its kind."""
    specials = SPECIALS[kind]
    names = [*specials.values(), *(f"entry{i}" for i in range(size - len(specials)))]
    return Tokenizer(kind, names, {role: i for i, role in enumerate(specials)}, lowercase=lowercase)


def corpus(vocabulary: Tokenizer, seq_len: int, folder: Path) -> Corpus:
    """16 documents of 8 sentences of about `seq_len` tokens in `folder`, held in and held out alike.

    Its tokens are all entries of the vocabulary in turn, so no two of a batch need be the same.
    """
    sentences = DOCUMENTS * SENTENCES
    n = sentences * (seq_len + 1)
    first = len(vocabulary.roles)
    arrays = {
        "tokens": (first + np.arange(n) % (vocabulary.size - first)).astype(np.uint32),
        "sentence_offsets": np.arange(sentences + 1, dtype=np.int64) * (seq_len + 1),
        "document_offsets": np.arange(DOCUMENTS + 1, dtype=np.int64) * SENTENCES,
        "extra_characters": np.zeros((0, 50), np.uint16),
    }
    counts = {"tokens": n, "sentences": sentences, "documents": DOCUMENTS, "extra_words": 0}
    counts |= {"bytes": 6 * n, "words": n, "unknown": 0}
    splits = []
    for name in ("train", "valid"):
        (folder / name).mkdir(parents=True)
        for array, values in arrays.items():
            np.save(folder / name / f"{array}.npy", values, allow_pickle=False)
        splits.append(Split(folder / name, counts, vocabulary))
    return Corpus(vocabulary, *splits, meta={})


def task(config) -> tuple[str, str, int]:
    """(name, kind, classes) of the task of a config: as the table of tasks has them, of others what the config says."""
    known = TASKS.get(config.data.task.name)
    kind = known.kind if known else config.data.task.kind or "single"
    labels = known.labels if known else tuple(filter(None, config.data.task.labels.split("+")))
    return config.data.task.name, kind, len(labels or ()) or 2


def task_corpus(config, vocabulary: Tokenizer, rows_per_example: int) -> Corpus:
    """Items of a task whose rows are full, enough for one batch of any layout."""
    _, kind, _ = task(config)
    n, T = DOCUMENTS, config.seq_len
    rows = n * rows_per_example
    arrays = {
        "tokens": np.arange(rows * T, dtype=np.uint32) % vocabulary.size,
        "row_offsets": np.arange(rows + 1) * T,
        "segment_1": np.full(rows, T // 2, np.int32),
        "item_example": np.arange(n, dtype=np.int32),
    }
    flat = {"tags": np.zeros(n * T, np.int32), "tag_positions": np.tile(np.arange(T, dtype=np.int32), n)}
    arrays |= {
        "single": {"labels": np.zeros(n, np.int32)},
        "similarity": {"scores": np.zeros(n, np.float32)},
        "tagging": flat | {"tag_offsets": np.arange(n + 1) * T},
        "span": {"answers": np.zeros((n, 2), np.int32)},
    }.get(kind, {"labels": np.zeros(n, np.int32)})
    if kind == "word":
        arrays["marked"] = np.zeros((rows, 2 // rows_per_example), np.int32)
    split = SimpleNamespace(
        name="train",
        arrays=arrays,
        n_items=n,
        n_cut=0,
        n_tokens=rows * T,
        rows_per_item=rows_per_example,
        lengths=np.full(rows, T),
        vectors=None,
        character_rows=lambda ids: np.zeros((*np.shape(ids), 50), np.uint16),
    )
    return Corpus(vocabulary, split, split, meta={})
