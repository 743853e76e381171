"""A corpus that says nothing but has a real one's shapes: for planning a run before its text is there."""

from pathlib import Path

import numpy as np

from plm.data.pipeline import Corpus
from plm.data.store import Split
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
