"""Vectors of words without context, from GloVe and word2vec files, by gensim (extra `static`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plm.data.sources import open_bytes
from plm.errors import UserError

ROWS = 400_000  # of a file that are read, the most frequent words in published ones


def read(path: str, setting: str):
    """gensim's KeyedVectors of a file, text or `.bin`. setting: how the user named it, for messages.

    Errors: UserError without gensim, and for a file that is not there or is no such file.
    """
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        raise UserError(f"{setting} needs gensim: pip install 'plm[static]'") from None
    if not Path(path).is_file():
        raise UserError(f"{setting}: there is no such file")
    options = {"binary": path.endswith((".bin", ".bin.gz")), "limit": ROWS, "unicode_errors": "replace"}
    if not options["binary"]:
        with open_bytes(path) as file:
            # word2vec's text files begin with two numbers, GloVe's with the first word.
            options["no_header"] = len(file.readline(1 << 16).split()) != 2
    try:
        return KeyedVectors.load_word2vec_format(path, **options)
    except (ValueError, EOFError, UnicodeError, IndexError) as error:
        raise UserError(f"{setting} is no GloVe or word2vec file: {error}") from None


def tables(path: str, vocabularies: Sequence[Sequence[str]], setting: str) -> list[np.ndarray]:
    """Of each list of words float32 [words + 1, D]: row 0, and words that the file has neither as written nor in lower
    case, are 0. The file is read once."""
    vectors = read(path, setting)
    found = []
    for words in vocabularies:
        rows = np.zeros((len(words) + 1, vectors.vector_size), np.float32)
        for number, word in enumerate(words, start=1):
            key = word if word in vectors else word.lower()
            if key in vectors:
                rows[number] = vectors[key]
        found.append(rows)
    return found
