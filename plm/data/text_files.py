"""Corpora in files of text or JSON lines, plain, .gz or .xz.

Memory: a shard never holds more than one part of a document (`PART_BYTES` of text), whatever the size of the corpus, a
file, a document or a line. Files are cut into byte ranges of about `SHARD_BYTES`, and a range owns the documents that
follow the blank lines (for jsonl: the records) that begin in it. A plain file is entered by seeking. A compressed one
has to be decompressed up to the range's first byte, so it is cut into at most `COMPRESSED_SHARDS` ranges, which bounds
that extra work by (COMPRESSED_SHARDS + 1) / 2 passes of decompression. Nothing is left out: a document longer than
`PART_BYTES` becomes several documents and a line longer than `LINE_BYTES` several sentences, cut at a space if it has
one. The exception is one JSON record, which has to fit into memory (`RECORD_BYTES` at most). Measured: a process
that reads 360 MB takes 95 MB, and 140 MB when all of it is a single line.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from plm.cache import remembered
from plm.data import corpora
from plm.data.corpora import (
    VERSION,
    Document,
    Shard,
    Source,
    documents_of,
    fingerprint_of,
    paragraph_sentences,
    split_sentences,
    splitter,
)
from plm.errors import UserError

COMPRESSED_SHARDS = 8
LINE_BYTES = 64 << 10
RECORD_BYTES = 1 << 30


def open_bytes(path: str):
    """The file as a stream of (decompressed) bytes; a damaged one raises one of `DAMAGED` where it is read."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    return open(path, "rb")


DAMAGED = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """`open_bytes`, where damage that is met inside becomes one line."""
    try:
        with open_bytes(path) as stream:
            yield stream
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); a whole .gz or .xz file would be right") from None


@dataclass(frozen=True)
class Scan:
    """What one pass over a file tells: digest and size of its decompressed bytes, and its invalid UTF-8."""

    digest: str
    size: int
    blank: bool
    invalid: int
    first_invalid: int


def scan(path: str) -> Scan:
    """Reads a file of text once; what it found is remembered."""
    return Scan(**remembered(_key("scan", path), lambda: vars(_scan(path))))


def digest(path: str) -> str:
    """`Scan.digest` alone, of a file that holds no text."""
    return remembered(_key("digest", path), lambda: _digest_of(path))


def _key(name: str, path: str) -> list:
    """Of what is remembered of a file: its path, size and times of change; the second one no program can set back."""
    status = os.stat(path)
    place = os.path.abspath(path)
    try:
        place.encode("utf-8")
    except UnicodeEncodeError:  # a name of other bytes, which cannot be hashed as text
        place = repr(os.fsencode(place))
    return [name, VERSION, place, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _scan(path: str) -> Scan:
    digest, size, blank, invalid, first = hashlib.blake2b(digest_size=16), 0, True, 0, -1
    pending = b""
    with opened(path) as stream:
        while True:
            block = stream.read(1 << 16)
            digest.update(block)
            size += len(block)
            blank = blank and (not block or block.isspace())
            data = pending + block
            try:
                at = codecs.utf_8_decode(data, "strict", not block)[1]
            except UnicodeDecodeError as error:
                first = first if invalid else size - len(data) + error.start
                text, at = codecs.utf_8_decode(data, "replace", not block)
                # Each invalid sequence has become a U+FFFD; those that the text itself has are valid.
                invalid += text.count("\ufffd") - data[:at].count("\ufffd".encode())
            pending = data[at:]
            if not block:
                return Scan(digest.hexdigest(), size, blank, invalid, first)


def _digest_of(path: str) -> str:
    with opened(path) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class Range:
    """The part [start, end) of a file, in decompressed bytes; every document or record belongs to one range."""

    path: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def _ranges(path: str, size: int) -> list[Range]:
    count = max(1, size // corpora.SHARD_BYTES)
    if path.endswith((".gz", ".xz")):
        count = min(count, COMPRESSED_SHARDS)
    borders = [size * i // count for i in range(count + 1)]
    return [Range(path, start, end) for start, end in itertools.pairwise(borders)]


def _files(spec: str, pattern: str) -> list[str]:
    """The files that a glob, or several joined by `+`, name; sorted within each."""
    for patterns in ([pattern], pattern.split("+")):
        found = [_glob(os.path.expanduser(one)) for one in patterns]
        if all(found):
            break
    else:
        missing = next(one for one, files in zip(patterns, found, strict=True) if not files)
        if missing and os.path.isdir(missing):
            raise UserError(
                f"data source {spec!r}: {missing!r} is a directory; {missing.rstrip('/')}/*.txt would be right"
            )
        raise UserError(
            f"data source {spec!r}: no file matches {missing!r}; a path or a glob of existing files is right"
        )
    files = list(dict.fromkeys(path for paths in found for path in paths))
    for path in files:
        if re.search(r"\.(tar(\.\w+)?|tgz|zip|7z|bz2|zst|parquet|arrow)$", path):
            raise UserError(f"data source {spec!r}: {path} cannot be read; plain, .gz or .xz text would be right")
        if not os.access(path, os.R_OK):
            raise UserError(f"data source {spec!r}: {path} cannot be read; check its permissions")
    return files


def _glob(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


class Files(Source):
    """What text and JSON lines share: files that are scanned once, cut into ranges and grouped into shards."""

    def __init__(self, spec: str, pattern: str, invalid_utf8: str):
        self.spec, self.invalid_utf8 = spec, invalid_utf8
        self.paths = _files(spec, pattern)

    @functools.cached_property
    def scans(self) -> list[Scan]:
        scans = []
        for path in self.paths:
            scans.append(scan(path))
            if scans[-1].invalid and self.invalid_utf8 == "error":
                raise _invalid_utf8(path, scans[-1].first_invalid)
        if all(one.blank for one in scans):
            raise UserError(f"data source {self.spec!r} is empty: no text in {len(scans)} file(s), {self.paths[0]} ...")
        return scans

    @property
    def replaced(self) -> int:
        return sum(one.invalid for one in self.scans)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(type(self).__name__, self.reading(), *(one.digest for one in self.scans))

    def reading(self) -> str:
        """What, beside the bytes, decides the sentences."""
        raise NotImplementedError

    def shard(self, ranges: tuple[Range, ...]) -> Shard:
        raise NotImplementedError

    def shards(self) -> list[Shard]:
        groups: list[list[Range]] = []
        room = 0
        for path, one in zip(self.paths, self.scans, strict=True):
            for piece in _ranges(path, one.size):
                size = piece.end - piece.start
                if size > room:
                    groups.append([])
                    room = corpora.SHARD_BYTES
                groups[-1].append(piece)
                room -= size
        return [self.shard(tuple(group)) for group in groups]


@dataclass(frozen=True)
class FileShard(Shard):
    """Ranges of files, read one after the other."""

    ranges: tuple[Range, ...]
    invalid_utf8: str

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.ranges)

    def documents(self) -> Iterator[Document]:
        for piece in self.ranges:
            with opened(piece.path) as stream:
                yield from self.read(piece, stream)

    def read(self, piece: Range, stream) -> Iterator[Document]:
        """The documents that belong to a range, from its file's stream at 0."""
        raise NotImplementedError


def _invalid_utf8(path: str, offset: int) -> UserError:
    return UserError(
        f"{path}: invalid UTF-8 at byte {offset}; UTF-8 would be right, or invalid_utf8=replace, which counts them"
    )


def _decode(raw: bytes, path: str, offset: int, invalid_utf8: str) -> str:
    try:
        return raw.decode("utf-8", "strict" if invalid_utf8 == "error" else "replace")
    except UnicodeDecodeError as error:
        raise _invalid_utf8(path, offset + error.start) from None


def _enter(stream, start: int, end: int) -> int:
    """Moves to the first line that begins at or after `start` and returns its offset (or one past `end`)."""
    if not start:
        return len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else stream.seek(0)
    stream.seek(start - 1)
    offset = start - 1
    while offset < end:
        skipped = stream.readline(1 << 20)
        offset += len(skipped)
        if not skipped or skipped.endswith(b"\n"):
            break
    return offset


def _lines(stream, offset: int) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, bytes without the line break, whether it is the whole line); long lines come in pieces."""
    kept, begins = b"", True
    while True:
        raw = kept + stream.readline(LINE_BYTES - len(kept))
        if not raw:
            return
        cut = len(raw)
        if ends := len(raw) < LINE_BYTES or raw.endswith(b"\n"):
            kept = b""
        else:
            # At the last space, else before the character that the limit has cut in two.
            first_bytes = (i for i in range(len(raw) - 4, len(raw)) if raw[i] & 0xC0 != 0x80)
            cut = raw.rfind(b" ") + 1 or max(first_bytes, default=len(raw))
            kept = raw[cut:]
        yield offset, raw[:cut].rstrip(b"\r\n") if ends else raw[:cut], begins and ends
        offset, begins = offset + cut, ends


class Text(Files):
    """`text:GLOB` and `text:GLOB#split`."""

    def __init__(self, spec: str, body: str, invalid_utf8: str):
        pattern, mark, option = body.rpartition("#")
        self.split = bool(mark) and option == "split"
        super().__init__(spec, pattern if self.split else body, invalid_utf8)

    def reading(self) -> str:
        return splitter() if self.split else "lines"

    def shard(self, ranges: tuple[Range, ...]) -> Shard:
        return TextShard(ranges, self.invalid_utf8, self.split)


@dataclass(frozen=True)
class TextShard(FileShard):
    split: bool

    def read(self, piece: Range, stream) -> Iterator[Document]:
        # A range owns the documents behind the blank lines that begin in it (the first one also the file's first), so
        # it stops at the first blank line at or after its end, which is where the next range starts.
        owns = piece.start == 0
        name, lines, size = "", [], 0
        for offset, raw, whole in _lines(stream, _enter(stream, piece.start, piece.end)):
            separator = whole and not raw.strip()
            if offset >= piece.end and (separator or not owns):
                break
            owns = owns or separator
            if owns and raw.strip():
                name = name or f"{piece.name}:{offset}"
                lines.append(_decode(raw, piece.path, offset, self.invalid_utf8).strip())
                size += len(raw)
            if lines and (separator or size >= corpora.PART_BYTES):
                yield from self._document(name, lines)
                name, lines, size = "", [], 0
        if lines:
            yield from self._document(name, lines)

    def _document(self, name: str, lines: list[str]) -> Iterator[Document]:
        sentences = split_sentences(" ".join(lines)) if self.split else [line for line in lines if line]
        if sentences:
            yield Document(name, tuple(sentences))


class JsonLines(Files):
    """`jsonl:GLOB#field`."""

    def __init__(self, spec: str, body: str, invalid_utf8: str):
        pattern, mark, self.field = body.rpartition("#")
        if not mark or not self.field:
            raise UserError(f"data source {spec!r} names no field; jsonl:GLOB#field would be right")
        super().__init__(spec, pattern, invalid_utf8)

    def reading(self) -> str:
        return f"{self.field} {splitter()}"

    def shard(self, ranges: tuple[Range, ...]) -> Shard:
        return JsonLinesShard(ranges, self.invalid_utf8, self.field)


@dataclass(frozen=True)
class JsonLinesShard(FileShard):
    field: str

    def read(self, piece: Range, stream) -> Iterator[Document]:
        offset = _enter(stream, piece.start, piece.end)
        while offset < piece.end and (raw := stream.readline(RECORD_BYTES)):
            if raw.strip():
                paragraphs = self._paragraphs(piece, offset, raw)
                yield from documents_of(f"{piece.name}:{offset}", paragraph_sentences(paragraphs))
            offset += len(raw)

    def _paragraphs(self, piece: Range, offset: int, raw: bytes) -> list[str]:
        def where() -> str:
            return f"{piece.path}, line {_line_number(piece.path, offset)}"

        if len(raw) >= RECORD_BYTES:
            raise UserError(f"{where()}: a record longer than {RECORD_BYTES:,} bytes; one JSON object a line is right")
        try:
            record = json.loads(_decode(raw, piece.path, offset, self.invalid_utf8))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where()}: not valid JSON ({error}); one JSON object a line is right") from None
        return paragraphs_of(record, self.field, where, self.invalid_utf8)


def _line_number(path: str, offset: int) -> int:
    """1-based; only an error message needs it, so it is counted only then."""
    with open_bytes(path) as stream:
        count = 1
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            count += block.count(b"\n")
            offset -= len(block)
        return count


def paragraphs_of(record, field: str, where, invalid_utf8: str) -> list[str]:
    """The paragraphs that a (nested) field of a record holds; a null holds none."""
    value = record
    for key in [field] if isinstance(record, dict) and field in record else field.split("."):
        if not isinstance(value, dict) or key not in value:
            have = ", ".join(map(repr, list(value)[:12])) if isinstance(value, dict) else type(value).__name__
            raise UserError(f"{where()}: no field {field!r} (there: {have})")
        value = value[key]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars of TensorFlow Datasets
        value = value.tolist()
    texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
    paragraphs = []
    for text in texts:
        if isinstance(text, bytes):
            text = _decode(text, where(), 0, invalid_utf8)
        if not isinstance(text, str):
            raise UserError(f"{where()}: field {field!r} holds {type(text).__name__}; text or a list of texts is right")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can escape half a surrogate pair
            if invalid_utf8 == "error":
                raise UserError(f"{where()}: field {field!r} holds half a surrogate pair, which is no text") from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        paragraphs.append(text)
    return paragraphs
