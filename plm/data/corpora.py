"""What a corpus is: documents of sentences, in shards that are read independently and in bounded memory."""

import importlib.metadata
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sentencex

from plm.randomness import stable_hash

VERSION = 1  # of the rules that turn bytes into sentences; a part of every fingerprint
SHARD_BYTES = 16 << 20  # of text, about
PART_BYTES = 4 << 20  # of text; a longer document becomes several
WINDOW = 2000  # characters given to the sentence splitter at once


@dataclass(frozen=True)
class Document:
    """One document: a name for messages (`file:byte`, a module, ...) and its sentences, none of them empty."""

    name: str
    sentences: tuple[str, ...]


class Shard:
    """An independently readable part of a source; picklable, so that another process can read it.

    bytes: about how much text it holds, for progress bars.
    """

    bytes: int

    def documents(self) -> Iterator[Document]:
        raise NotImplementedError


class Source:
    """A corpus. Subclass it for one of your own and name it as `module:function` (the function returns it).

    spec: the string it was made from. licence: as stated by the corpus, or None. fingerprint: depends on the content
    and the reading rules only, not on paths or times, so that equal corpora have equal ones on every machine.
    replaced: invalid UTF-8 sequences that were replaced by U+FFFD (only under `invalid_utf8="replace"`).
    """

    spec: str
    licence: str | None = None
    replaced: int = 0

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError

    def shards(self) -> Sequence[Shard]:
        """All shards, in an order that is the same on every machine."""
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        """All documents in order, read in this process."""
        for shard in self.shards():
            yield from shard.documents()


def split_of(document: Document, valid_fraction: float) -> str:
    """'valid' for about `valid_fraction` of the documents, else 'train': by the text, so that copies stay together."""
    return "valid" if uniform("split", document) < valid_fraction else "train"


def uniform(name: str, document: Document) -> float:
    """A number in [0, 1) that depends on the name and the document's text only."""
    return stable_hash(name, "\n".join(document.sentences), bits=53) / 2**53


def fingerprint_of(*parts) -> str:
    """Of a corpus, by what it holds and the rules of reading."""
    return f"{stable_hash(VERSION, *parts, bits=128):032x}"


# --------------------------------------------------------------------------------------------------------- sentences


_PLAIN_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")
# sentencex 1.0 cuts into the bytes of a space that is not ASCII behind a capital letter that stands alone and before a
# full stop, as in "C\u00a0. elegans", and panics: which no `except Exception` catches.
_WIDE_SPACE = re.compile(r"(?<![^\s.])([A-Z]\s*)[^\S\x00-\x7f](?=\.)")


def _segment(text: str) -> list[str]:
    """sentencex's parts of a text, which together are the text; it sees a plain space where another makes it panic."""
    if text.isascii():
        return sentencex.segment("en", text)
    shown = _WIDE_SPACE.sub(r"\1 ", text)
    parts = sentencex.segment("en", shown)
    if shown == text:
        return parts
    ends = itertools.accumulate(map(len, parts))
    return [text[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]


def split_sentences(text: str) -> list[str]:
    """The sentences of running text, stripped, by sentencex.

    sentencex finds no boundary between a bracket or quotation mark that is never closed and the end of its input. So it
    sees about `WINDOW` characters at a time (the last sentence of a window is seen again), and where it finds nothing
    in a window the first plain one (full stop, space, capital letter) is taken, or failing that a space.
    """
    found, start = [], 0
    while start < len(text):
        end = start + WINDOW
        parts = _segment(text[start:end])
        if end < len(text):
            if len(parts) > 1:
                parts.pop()
            else:
                plain = _PLAIN_END.search(text, start, start + 4 * WINDOW)
                cut = plain.end() if plain else text.rfind(" ", start, start + 4 * WINDOW) + 1
                parts = [text[start : cut if cut > start else start + 4 * WINDOW]]
        found += (part.strip() for part in parts)
        start += sum(map(len, parts))
    return [sentence for sentence in found if sentence]


def splitter() -> str:
    """What decides the sentences of running text, for fingerprints."""
    return f"sentencex {importlib.metadata.version('sentencex')}"


def paragraph_sentences(paragraphs: Iterable[str]) -> list[str]:
    """Sentences of paragraphs; a line break ends a sentence too."""
    return [s for paragraph in paragraphs for line in paragraph.split("\n") for s in split_sentences(line)]


def documents_of(name: str, sentences: Iterable[str]) -> Iterator[Document]:
    """The document of these sentences, or several when it is longer than `PART_BYTES`."""
    held: list[str] = []
    size = part = 0
    for sentence in sentences:
        held.append(sentence)
        size += len(sentence)
        if size >= PART_BYTES:
            yield Document(f"{name}#{part}", tuple(held))
            held, size, part = [], 0, part + 1
    if held:
        yield Document(f"{name}#{part}" if part else name, tuple(held))
