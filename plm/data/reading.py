"""Texts as ids, which word each piece belongs to, and the windows in which long texts are read."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from plm.data import spans
from plm.data.tokenizers import Tokenizer
from plm.errors import UserError

Text = str | Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A text as a model reads it, without what frames it.

    words: its words (what stands between white space, or as given). pieces, ids: of the vocabulary (int64 [n]; unknown
    words are the unknown id, though a model that reads characters sees their spelling). word: int32 [n], rising: the
    word that each piece belongs to; a word of which the tokenizer leaves nothing has none.
    """

    words: list[str]
    pieces: list[str]
    ids: np.ndarray
    word: np.ndarray

    def __len__(self) -> int:
        return len(self.pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Several texts: words, ids (int64, from tokenizer.size on they index `open_words`) and the word of each piece."""

    words: list[list[str]]
    ids: list[np.ndarray]
    word: list[np.ndarray]
    open_words: list[str]


def read(tokenizer: Tokenizer, texts: Sequence[Text]) -> Reading:
    """Errors: UserError for anything but a list of strings and of lists of words."""
    if isinstance(texts, str):
        raise UserError("texts must be a list: strings, or lists of words; for one text give [text]")
    words = [text.split() if isinstance(text, str) else list(text) for text in texts]
    numbers: dict[tuple[bool, str], int] = {}
    for text, split in zip(texts, words, strict=True):
        for word in split:
            if not isinstance(word, str):
                raise UserError(f"texts must be strings or lists of words, not lists of {type(word).__name__}")
            numbers.setdefault((isinstance(text, str), word), len(numbers))
    # Each distinct word is read once, as rules of tokenizers do not look across white space. Where they do, ids may
    # differ from those of a store: byte_bpe there keeps runs of white space, of which nothing is read here, and ftfy
    # (GPT's bpe) leaves HTML entities in text that has a "<" anywhere, and mends mojibake that contains a space.
    encoded, open_words = _read_words(tokenizer, list(numbers))
    ids, of_word = [], []
    for text, split in zip(texts, words, strict=True):
        pieces = [encoded[numbers[isinstance(text, str), word]] for word in split]
        ids.append(np.fromiter((piece for word in pieces for piece in word), np.int64))
        of_word.append(np.repeat(np.arange(len(split), dtype=np.int32), [len(word) for word in pieces]))
    return Reading(words, ids, of_word, open_words)


def _read_words(tokenizer: Tokenizer, words: list[tuple[bool, str]]) -> tuple[list[list[int]], list[str]]:
    """Ids of each (of running text?, word); ids from tokenizer.size on index the list of unknown words."""
    running = [word for is_running, word in words if is_running]
    given = [[word] for is_running, word in words if not is_running]
    of_running, open_words = tokenizer.encode_open(running) if running else ([], [])
    of_given = tokenizer.encode_words(given) if given else []
    if tokenizer.kind == "words":
        unknown, known = tokenizer.role("unk"), {word: i for i, word in enumerate(open_words)}
        for (word,), ids in zip(given, of_given, strict=True):
            if ids == [unknown] and word != tokenizer.vocabulary[unknown]:
                ids[0] = tokenizer.size + known.setdefault(word, len(known))
        open_words = list(known)
    first, second = iter(of_running), iter(of_given)
    return [next(first if is_running else second) for is_running, _ in words], open_words


def tokenize(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[Tokens]:
    reading = read(tokenizer, texts)
    return [
        Tokens(words, tokenizer.pieces(ids), tokenizer.target_id(ids), of_word)
        for words, ids, of_word in zip(reading.words, reading.ids, reading.word, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Window:
    """Pieces [start, stop) of a text, read together; those of [first, last) are taken from here."""

    text: int
    start: int
    stop: int
    first: int
    last: int


def windows(text: int, n: int, room: int | None, stride: int, *, sees_right: bool) -> list[Window]:
    """The windows of a text of n pieces: one if it fits into `room`, else one every `stride` pieces.

    Each piece is taken from the window in which it has most context, the rule of BERT's code for SQuAD
    (`plm.data.spans.most_context`).
    """
    if room is None or n <= room:
        return [Window(text, 0, n, 0, n)]
    found = spans.windows(n, room, stride)
    owner = spans.most_context(found, n, sees_right=sees_right)
    numbers = np.arange(len(found))
    firsts, lasts = np.searchsorted(owner, numbers, side="left"), np.searchsorted(owner, numbers, side="right")
    return [
        Window(text, int(start), int(stop), int(first), int(last))
        for (start, stop), first, last in zip(found, firsts, lasts, strict=True)
        if last > first
    ]
