"""Vectors of words without context, by gensim (extra `static`): from GloVe and word2vec files, or trained here.

glove.txt, vectors.bin      files, plain or .gz
word2vec:SOURCE             word2vec on a corpus (`plm.data.sources`), trained once and kept: the baseline that has
                            read the same text as a language model, and gives a word one vector wherever it stands
"""

import re
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plm.cache import cache_directory, once
from plm.data import sources
from plm.data.text_files import DAMAGED, open_bytes
from plm.errors import UserError
from plm.randomness import stable_hash

ROWS = 400_000  # of a file that are read, the most frequent words in published ones
TRAINED = "word2vec:"
# Skip-gram with negative samples (Mikolov et al. 2013). One worker: with several no two trainings are alike.
SETTINGS = {"vector_size": 128, "window": 5, "min_count": 2, "sg": 1, "negative": 5, "epochs": 10, "seed": 0}
_PARTS = re.compile(r"\w+|[^\w\s]")
_MARKS = string.punctuation + "\u201c\u201d\u2018\u2019"


def read(path: str, setting: str):
    """gensim's KeyedVectors of a file, text or `.bin`, or of `word2vec:SOURCE`. setting: how the user named it, for
    messages.

    Errors: UserError without gensim, and for a file that is not there or is no such file.
    """
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        raise UserError(f"{setting} needs gensim: pip install 'plm[static]'") from None
    if path.startswith(TRAINED):
        path = str(_trained(path.removeprefix(TRAINED)))
    if not Path(path).is_file():
        raise UserError(f"{setting}: there is no such file")
    options = {"binary": path.endswith((".bin", ".bin.gz")), "limit": ROWS, "unicode_errors": "replace"}
    try:
        if not options["binary"]:
            with open_bytes(path) as file:
                # word2vec's text files begin with two numbers, GloVe's with the first word.
                options["no_header"] = len(file.readline(1 << 16).split()) != 2
        return KeyedVectors.load_word2vec_format(path, **options)
    except (ValueError, UnicodeError, IndexError, OSError, *DAMAGED) as error:
        raise UserError(f"{setting} is no GloVe or word2vec file: {error}") from None


def _trained(spec: str) -> Path:
    """The file of word2vec's vectors on a corpus, made if it is not there."""
    source = sources.parse(spec)
    name = stable_hash("word2vec", source.fingerprint, *sorted(SETTINGS.items()), bits=128)
    return once(cache_directory() / "word2vec" / f"{name:032x}.bin", lambda path: _train(source, path))


def _train(source: sources.Source, path: Path) -> None:
    from gensim.models import Word2Vec

    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".txt", encoding="utf-8") as text:
        # gensim reads the corpus in every epoch: from one file of words, however slow the source is.
        for document in source.documents():
            for sentence in document.sentences:
                text.write(" ".join(_PARTS.findall(sentence)) + "\n")
        text.flush()
        try:
            model = Word2Vec(corpus_file=text.name, workers=1, **SETTINGS)
        except RuntimeError as error:
            if "vocabulary" not in str(error):
                raise
            raise UserError(
                f"{TRAINED}{source.spec}: no word occurs {SETTINGS['min_count']} times; a larger corpus is right"
            ) from None
    model.wv.save_word2vec_format(str(path), binary=True)


def tables(path: str, vocabularies: Sequence[Sequence[str]], setting: str) -> list[np.ndarray]:
    """Of each list of words float32 [words + 1, D]: row 0, and words that the file has neither as written nor in lower
    case, with or without the marks around them, are 0. The file is read once."""
    vectors = read(path, setting)
    found = []
    for words in vocabularies:
        rows = np.zeros((len(words) + 1, vectors.vector_size), np.float32)
        for number, word in enumerate(words, start=1):
            bare = word.strip(_MARKS)
            key = next((key for key in (word, word.lower(), bare, bare.lower()) if key in vectors), None)
            if key is not None:
                rows[number] = vectors[key]
        found.append(rows)
    return found
