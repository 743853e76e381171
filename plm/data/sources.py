"""Corpora: one spec string -> documents of sentences, in shards that are read independently and in bounded memory.

    pydocs                            the English documentation inside this CPython, cleaned to prose
    pydocs#without_tasks              the same without the packages that the embedded tasks are made of
    text:GLOB                         blank lines separate documents, one sentence a line; plain, .gz, .xz
    text:GLOB#split                   the lines of a document are joined and split into sentences
    jsonl:GLOB#field                  one JSON object a line; the field is a string or a list of strings (paragraphs)
    tfds:NAME[/config][:split]#field  a TensorFlow Datasets dataset, prepared once if it is not there (split: train)
    tfds:DIRECTORY[:split]#field      a prepared one; both need file_format=array_record and never import TensorFlow
    task:NAME[,key=value...][#split]  the texts of a task, by default of its train split (`plm.data.tasks`)
    module:function                   a user's own: the function returns a `Source`
    2*text:a/*.xz+0.5*pydocs          a mixture; a weight counts passes per epoch; a fraction is a fixed subset

Nested fields are written with dots (`article.body`). A glob may itself be several, joined by `+`.

Memory: a shard never holds more than one part of a document (`PART_BYTES` of text), whatever the size of the corpus, a
file, a document or a line. Files are cut into byte ranges of about `SHARD_BYTES`, and a range owns the documents that
follow the blank lines (for jsonl: the records) that begin in it. A plain file is entered by seeking. A compressed one
has to be decompressed up to the range's first byte, so it is cut into at most `COMPRESSED_SHARDS` ranges, which bounds
that extra work by (COMPRESSED_SHARDS + 1) / 2 passes of decompression. Nothing is left out: a document longer than
`PART_BYTES` becomes several documents and a line longer than `LINE_BYTES` several sentences, cut at a space if it has
one. The exception is one JSON record, which has to fit into memory (`RECORD_BYTES` at most). Measured: a process
that reads 360 MB takes 95 MB, and 140 MB when all of it is a single line.
"""

import ast
import codecs
import functools
import glob
import gzip
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import lzma
import os
import re
import sys
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencex

from plm.errors import UserError
from plm.randomness import stable_hash

VERSION = 1  # of the rules that turn bytes into sentences; a part of every fingerprint
SHARD_BYTES = 16 << 20
COMPRESSED_SHARDS = 8
PART_BYTES = 4 << 20
LINE_BYTES = 64 << 10
RECORD_BYTES = 1 << 30
WINDOW = 2000  # characters given to the sentence splitter at once
SPECS = "pydocs, text:GLOB, jsonl:GLOB#field, tfds:NAME#field, tfds:DIRECTORY#field or module:function"


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


def cache_directory() -> Path:
    """Where stores and remembered fingerprints live: $PLM_CACHE, else ~/.cache/plm."""
    return Path(os.environ.get("PLM_CACHE") or Path.home() / ".cache" / "plm")


def split_of(document: Document, valid_fraction: float) -> str:
    """'valid' for about `valid_fraction` of the documents, else 'train': by the text, so that copies stay together."""
    return "valid" if _uniform("split", document) < valid_fraction else "train"


def _uniform(name: str, document: Document) -> float:
    """A number in [0, 1) that depends on the name and the document's text only."""
    return stable_hash(name, "\n".join(document.sentences), bits=53) / 2**53


# ---------------------------------------------------------------------------------------------------------- the spec

_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)\*")
_PLUGIN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NEXT_TERM = re.compile(r"\+(?=(?:(?:\d+\.?\d*|\.\d+)\*)?(?:pydocs(?:#without_tasks)?(?=\+|$)|[A-Za-z_][\w.]*:\S))")


def parse(spec: str, *, invalid_utf8: str = "error") -> Source:
    """The source of a spec string (the module's docstring lists them).

    invalid_utf8: "error" stops at the first invalid byte and names it; "replace" puts U+FFFD there and counts.
    Raises UserError for a spec that cannot be read, files that do not exist and fields that a dataset does not have;
    what only the content tells (empty, invalid, a field missing in line 7) is raised where it is read.
    """
    if invalid_utf8 not in ("error", "replace"):
        raise UserError(f"invalid_utf8={invalid_utf8!r}: 'error' or 'replace' would be right")
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"data source {spec!r} is empty; right would be {SPECS}")
    terms = []
    for term in _NEXT_TERM.split(spec.strip()):
        weight = _WEIGHT.match(term)
        source = _single(term[weight.end() :] if weight else term, invalid_utf8)
        terms.append((float(weight[1]) if weight else 1.0, source))
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    return Mixture(spec.strip(), terms)


def _single(term: str, invalid_utf8: str) -> Source:
    scheme, colon, body = term.partition(":")
    if term in ("pydocs", "pydocs#without_tasks"):
        return PythonDocumentation(without_tasks=term != "pydocs")
    if scheme == "task" and colon:
        from plm.data.tasks import TaskText  # tasks are read by way of this module

        return TaskText(term, body)
    if colon and scheme in ("text", "jsonl", "tfds"):
        kind = {"text": Text, "jsonl": JsonLines, "tfds": TensorFlowDataset}[scheme]
        return kind(term, body, invalid_utf8)
    if _PLUGIN.fullmatch(term):
        return _plugin(term)
    raise UserError(f"data source {term!r} is not understood; right would be {SPECS}")


def _plugin(term: str) -> Source:
    module, _, name = term.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise UserError(f"data source {term!r}: no module {error.name!r}; right would be {SPECS}") from None
    except AttributeError:
        raise UserError(f"data source {term!r}: module {module!r} has no {name!r}") from None
    source = make()
    if not all(hasattr(source, attribute) for attribute in ("spec", "fingerprint", "shards")):
        raise UserError(f"data source {term!r} returned {type(source).__name__}; a plm.data.sources.Source is right")
    return source


class Mixture(Source):
    """Several sources as one corpus; a term of weight 2.3 gives two whole passes and a fixed 30% of its documents.

    The subset is chosen by the hash of a document's text, so a smaller fraction is a subset of a larger one. Repeated
    documents go to the same split (`split_of` sees the text only).
    """

    def __init__(self, spec: str, terms: Sequence[tuple[float, Source]]):
        for weight, source in terms:
            if not weight > 0:
                raise UserError(f"data source {spec!r}: weight {weight:g} of {source.spec!r} must be above 0")
        self.spec, self.terms = spec, tuple(terms)
        licences = dict.fromkeys(source.licence for _, source in terms if source.licence)
        self.licence = " + ".join(licences) or None

    @property
    def fingerprint(self) -> str:
        return _digest("mixture", *(part for weight, source in self.terms for part in (weight, source.fingerprint)))

    @property
    def replaced(self) -> int:
        return sum(source.replaced for _, source in self.terms)

    def shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for weight, source in self.terms:
            own = list(source.shards())
            shards += own * int(weight)
            if weight % 1:
                shards += [SubsetShard(shard, weight % 1) for shard in own]
        return shards


@dataclass(frozen=True)
class SubsetShard(Shard):
    """A fixed fraction of another shard's documents."""

    shard: Shard
    fraction: float

    @property
    def bytes(self) -> int:
        return int(self.shard.bytes * self.fraction)

    def documents(self) -> Iterator[Document]:
        return (document for document in self.shard.documents() if _uniform("mixture", document) < self.fraction)


def _digest(*parts) -> str:
    return f"{stable_hash(VERSION, *parts, bits=128):032x}"


# --------------------------------------------------------------------------------------------------------- sentences


_PLAIN_END = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    """The sentences of running text, stripped, by sentencex.

    sentencex finds no boundary between a bracket or quotation mark that is never closed and the end of its input. So it
    sees about `WINDOW` characters at a time (the last sentence of a window is seen again), and where it finds nothing
    in a window the first plain one (full stop, space, capital letter) is taken, or failing that a space.
    """
    found, start = [], 0
    while start < len(text):
        end = start + WINDOW
        parts = sentencex.segment("en", text[start:end])
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


def _paragraph_sentences(paragraphs: Iterable[str]) -> list[str]:
    """Sentences of paragraphs; a line break ends a sentence too."""
    return [s for paragraph in paragraphs for line in paragraph.split("\n") for s in split_sentences(line)]


def _parts(name: str, sentences: Iterable[str]) -> Iterator[Document]:
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


# ------------------------------------------------------------------------------------------------------------- files


def open_bytes(path: str):
    """The file as a stream of (decompressed) bytes; a damaged one raises one of `DAMAGED` where it is read."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    return open(path, "rb")


DAMAGED = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be decompressed ({error}); a whole .gz or .xz file would be right")


@dataclass(frozen=True)
class Scan:
    """What one pass over a file tells: digest and size of its decompressed bytes, and its invalid UTF-8."""

    digest: str
    size: int
    blank: bool
    invalid: int
    first_invalid: int


def scan(path: str) -> Scan:
    """Reads a file of text once."""
    return Scan(**_once(path, "scan", lambda: vars(_scan(path))))


def digest(path: str) -> str:
    """`Scan.digest` alone, of a file that holds no text."""
    return _once(path, "digest", lambda: _digest_of(path))


def _once(path: str, name: str, make: Callable[[], Any]) -> Any:
    """What `make` finds in a file, remembered in the cache under this name by path, size and time of change."""
    status = os.stat(path)
    key = [name, VERSION, os.path.abspath(path), status.st_size, status.st_mtime_ns]
    remembered = cache_directory() / "scans" / f"{stable_hash(*key, bits=128):032x}.json"
    try:
        record = json.loads(remembered.read_text("utf-8"))
        if record["key"] == key:
            return record[name]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = make()
    _remember(remembered, {"key": key, name: found})
    return found


def _remember(path: Path, record: dict) -> None:
    """Writes a small cache entry atomically; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(file.name, path)
    except OSError:
        pass


def _scan(path: str) -> Scan:
    digest, size, blank, invalid, first = hashlib.blake2b(digest_size=16), 0, True, 0, -1
    pending = b""
    try:
        with open_bytes(path) as stream:
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
    except DAMAGED as error:
        raise _damaged(path, error) from None


def _digest_of(path: str) -> str:
    try:
        with open_bytes(path) as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except DAMAGED as error:
        raise _damaged(path, error) from None


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
    count = max(1, size // SHARD_BYTES)
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
        return _digest(type(self).__name__, self.reading(), *(one.digest for one in self.scans))

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
                    room = SHARD_BYTES
                groups[-1].append(piece)
                room -= size
        return [self.shard(tuple(group)) for group in groups]


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
        return TextShard(ranges, self.split, self.invalid_utf8)


@dataclass(frozen=True)
class TextShard(Shard):
    ranges: tuple[Range, ...]
    split: bool
    invalid_utf8: str

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.ranges)

    def documents(self) -> Iterator[Document]:
        for piece in self.ranges:
            try:
                with open_bytes(piece.path) as stream:
                    yield from self._documents(piece, stream)
            except DAMAGED as error:
                raise _damaged(piece.path, error) from None

    def _documents(self, piece: Range, stream) -> Iterator[Document]:
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
            if lines and (separator or size >= PART_BYTES):
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
        return JsonLinesShard(ranges, self.field, self.invalid_utf8)


@dataclass(frozen=True)
class JsonLinesShard(Shard):
    ranges: tuple[Range, ...]
    field: str
    invalid_utf8: str

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.ranges)

    def documents(self) -> Iterator[Document]:
        for piece in self.ranges:
            try:
                with open_bytes(piece.path) as stream:
                    offset = _enter(stream, piece.start, piece.end)
                    while offset < piece.end and (raw := stream.readline(RECORD_BYTES)):
                        if raw.strip():
                            paragraphs = self._paragraphs(piece, offset, raw)
                            yield from _parts(f"{piece.name}:{offset}", _paragraph_sentences(paragraphs))
                        offset += len(raw)
            except DAMAGED as error:
                raise _damaged(piece.path, error) from None

    def _paragraphs(self, piece: Range, offset: int, raw: bytes) -> list[str]:
        def where() -> str:
            return f"{piece.path}, line {_line_number(piece.path, offset)}"

        if len(raw) >= RECORD_BYTES:
            raise UserError(f"{where()}: a record longer than {RECORD_BYTES:,} bytes; one JSON object a line is right")
        try:
            record = json.loads(_decode(raw, piece.path, offset, self.invalid_utf8))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where()}: not valid JSON ({error}); one JSON object a line is right") from None
        return _field(record, self.field, where, self.invalid_utf8)


def _line_number(path: str, offset: int) -> int:
    """1-based; only an error message needs it, so it is counted only then."""
    with open_bytes(path) as stream:
        count = 1
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            count += block.count(b"\n")
            offset -= len(block)
        return count


def _field(record, field: str, where, invalid_utf8: str) -> list[str]:
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


# ----------------------------------------------------------------------------------------------- TensorFlow Datasets


class TensorFlowDataset(Source):
    """`tfds:NAME[/config][:split]#field` and `tfds:DIRECTORY[:split]#field`; one document an example.

    The files have to be array_record, the format with random access. The fingerprint covers their bytes.
    """

    def __init__(self, spec: str, body: str, invalid_utf8: str):
        self.spec, self.invalid_utf8 = spec, invalid_utf8
        name, mark, self.field = body.rpartition("#")
        if not mark or not self.field or not name:
            raise UserError(f"data source {spec!r} names no field; tfds:NAME#field would be right")
        name, _, split = name.partition(":")
        if split[:1].isdigit():  # NAME:1.0.0 is the catalogue's way to ask for a version
            version, _, split = split.partition(":")
            name = f"{name}:{version}"
        self.split = split or "train"
        builder = tfds_builder(spec, name)
        self.directory = str(builder.data_dir)
        try:
            self.info = builder.info.splits[self.split]
            self.examples = len(builder.as_data_source(self.split))
        except NotImplementedError:
            raise UserError(
                f"data source {spec!r}: {self.directory} is stored as {builder.info.file_format.value}; "
                "prepare it with file_format=array_record"
            ) from None
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits) or "none"
            raise UserError(f"data source {spec!r}: split {self.split!r} ({error}); there are: {splits}") from None
        features = builder.info.features
        for key in self.field.split("."):
            features = getattr(features, "feature", features)
            if not hasattr(features, "keys") or key not in features:
                have = ", ".join(map(repr, sorted(builder.info.features)))
                raise UserError(f"data source {spec!r}: no field {self.field!r} (there: {have})")
            features = features[key]
        if not self.examples:
            raise UserError(f"data source {spec!r} is empty: split {self.split!r} has no examples")
        self.licence = builder.info.redistribution_info.license or None

    @functools.cached_property
    def fingerprint(self) -> str:
        files = sorted(map(str, self.info.filepaths))
        return _digest("tfds", self.split, self.field, splitter(), *map(digest, files))

    def shards(self) -> list[Shard]:
        size = max(1, self.info.num_bytes)
        count = min(self.examples, -(-size // SHARD_BYTES))
        borders = [self.examples * i // count for i in range(count + 1)]
        return [
            TensorFlowDatasetShard(
                self.spec, self.directory, self.split, self.field, start, stop, size // count, self.invalid_utf8
            )
            for start, stop in itertools.pairwise(borders)
        ]


def tfds_builder(spec: str, name: str, *, prepare: bool = True):
    """The prepared dataset of a directory, or of a name of the catalogue, which is prepared if it is not there.

    prepare: False takes a dataset of the catalogue as it is; its features are known without its files.
    """
    import tensorflow_datasets as tfds

    path = os.path.expanduser(name)
    if os.path.isdir(path) or name.startswith(("/", ".", "~")):
        try:
            return tfds.builder_from_directory(path)
        except Exception as error:
            reason = _first_line(error)
            raise UserError(f"data source {spec!r}: {path} is no prepared dataset of TFDS ({reason})") from None
    try:
        try:
            builder = tfds.builder(name, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError:
            # Builders outside of the package's own index register themselves when their module is imported.
            importlib.import_module(f"tensorflow_datasets.text.{name.partition('/')[0]}")
            builder = tfds.builder(name, file_format="array_record")
    except ImportError:
        raise UserError(
            f"data source {spec!r}: TFDS knows no dataset {name!r}; a name of its catalogue or the directory of a "
            "prepared dataset would be right"
        ) from None
    except (ValueError, tfds.core.registered.DatasetNotFoundError) as error:
        raise UserError(f"data source {spec!r}: {_first_line(error)}") from None
    if prepare and not builder.info.splits:
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise UserError(
                f"data source {spec!r}: {name} is not in {builder.data_dir} and could not be prepared there "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from None
    return builder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@dataclass(frozen=True)
class TensorFlowDatasetShard(Shard):
    spec: str
    directory: str
    split: str
    field: str
    start: int
    stop: int
    bytes: int
    invalid_utf8: str

    def documents(self) -> Iterator[Document]:
        import tensorflow_datasets as tfds

        examples = tfds.builder_from_directory(self.directory).as_data_source(self.split)
        # About a megabyte a read: one example at a time is slow for short ones, many at a time are large for books.
        step = max(1, min(256, (self.stop - self.start) * (1 << 20) // max(1, self.bytes)))
        for first in range(self.start, self.stop, step):
            indices = range(first, min(first + step, self.stop))
            for index, example in zip(indices, examples.__getitems__(list(indices)), strict=True):
                where = f"{self.spec}, example {index}"
                paragraphs = _field(example, self.field, lambda where=where: where, self.invalid_utf8)
                yield from _parts(f"{self.split}:{index}", _paragraph_sentences(paragraphs))


# ------------------------------------------------------------------------------------------------------------ pydocs

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "turtledemo"}
_MODULES_PER_SHARD = 80
# What the embedded tasks are made of (`plm.data.docstrings`): packages of many docstrings that every CPython has.
TASK_PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip


class PythonDocumentation(Source):
    """`pydocs`: `pydoc_data.topics` and the docstrings of the standard library of the Python that runs.

    One document per topic or module, about 1.7 MB of prose. Sources are parsed, never imported. The text differs
    between Python versions. without_tasks: leaves out the packages of `TASK_PACKAGES` and what was copied from them,
    for pretraining before the embedded tasks: about 1.3 MB.
    """

    licence = "PSF-2.0"

    def __init__(self, *, without_tasks: bool = False):
        self.without_tasks = without_tasks
        self.spec = "pydocs#without_tasks" if without_tasks else "pydocs"

    @functools.cached_property
    def files(self) -> list[tuple[str, str]]:
        """(module, path), sorted; the topics first."""
        root = sysconfig.get_path("stdlib")
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("config-"))
            for file in sorted(files):
                if file.endswith(".py"):
                    path = os.path.join(folder, file)
                    module = os.path.relpath(path, root)[: -len(".py")].replace(os.sep, ".")
                    module = module.removesuffix(".__init__")
                    if not (self.without_tasks and module.split(".")[0] in TASK_PACKAGES):
                        found.append((module, path))
        topics = os.path.join(root, "pydoc_data", "topics.py")
        return [("topics", topics)] * os.path.isfile(topics) + sorted(found)

    @functools.cached_property
    def fingerprint(self) -> str:
        stats = [(module, os.stat(path).st_size, os.stat(path).st_mtime_ns) for module, path in self.files]
        key = [VERSION, splitter(), sys.version, sysconfig.get_path("stdlib"), _digest(stats)]
        remembered = cache_directory() / "scans" / f"{stable_hash(self.spec, *key, bits=128):032x}.json"
        try:
            record = json.loads(remembered.read_text("utf-8"))
            if record["key"] == key:
                return record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = hashlib.blake2b(digest_size=16)
        for document in self.documents():
            digest.update("\n".join((*document.sentences, "", "")).encode())
        fingerprint = _digest(self.spec, digest.hexdigest())
        _remember(remembered, {"key": key, "fingerprint": fingerprint})
        return fingerprint

    def shards(self) -> list[Shard]:
        if not self.files:
            raise UserError("data source 'pydocs' is empty: this Python comes without the source of its library")
        groups = [self.files[i : i + _MODULES_PER_SHARD] for i in range(0, len(self.files), _MODULES_PER_SHARD)]
        return [PythonDocumentationShard(tuple(group), self.without_tasks) for group in groups]


@dataclass(frozen=True)
class PythonDocumentationShard(Shard):
    files: tuple[tuple[str, str], ...]
    without_tasks: bool = False

    @property
    def bytes(self) -> int:
        # Docstrings are about a tenth of a module.
        return sum(os.path.getsize(path) // (1 if module == "topics" else 10) for module, path in self.files)

    def documents(self) -> Iterator[Document]:
        for module, path in self.files:
            with open(path, "rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                try:
                    tree = ast.parse(file.read())
                except (SyntaxError, ValueError):  # a template or a deliberately broken file
                    continue
            texts = _topics(tree) if module == "topics" else {module: _docstrings(tree)}
            for name, blocks in texts.items():
                # Generated modules repeat the same docstring dozens of times.
                sentences = dict.fromkeys(sentence for block in blocks for sentence in prose(block))
                if self.without_tasks:
                    from plm.data.docstrings import is_copied  # they are made of this module's parts

                    sentences = [sentence for sentence in sentences if not is_copied(sentence)]
                if sentences:
                    yield Document(f"pydocs:{name}", tuple(sentences))


def _topics(tree: ast.Module) -> dict[str, list[str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {f"topics.{name}": [text] for name, text in sorted(ast.literal_eval(node.value).items())}
    return {}


def _docstrings(tree: ast.Module) -> list[str]:
    """All docstrings in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


_BULLET = re.compile(r"^\s*(?:[*•·+-]|\(?\d{1,2}[.)]|\(?[a-z]\)|\[\d+\]|\.\. \[\w+\])\s+")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:-]+::\s*")
_CODE_DIRECTIVE = re.compile(r"\s*\.\. (?:code|code-block|sourcecode|productionlist|literalinclude|math|testcode)::")
_FIELD = re.compile(r"^\s*:(?:param|type|return|returns|rtype|raise|raises|keyword|arg|var)\b[^:]*:\s*")
_PROMPT = re.compile(r"\s*(?:>>>|\.\.\. |In \[\d+\]|[$%#] )")
_RULE = re.compile(r"\s*([=\-~^*#\"'`.+_|])\1{2,}[\s=\-~^+|]*$")
_TABLE = re.compile(r"\s*(?:\+[-=+]{3,}|\||={3,}\s+={3,}|-{3,}\s+-{3,})")
_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`(?:[~!])?([^`<]*?)(?:\s*<[^`>]*>)?`")
_INLINE = re.compile(
    r"``([^`]+)``|`([^`]+)`_{0,2}|(?<!\w)\*\*(\S(?:[^*]*\S)?)\*\*(?!\w)|(?<!\w)\*(\S(?:[^*]*\S)?)\*(?!\w)"
)
_WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:[-'’/][A-Za-z]+)*(?:'s|’s)?[)\"'”’]*[,.;:!?]*[)\"'”’]*")


def prose(text: str) -> list[str]:
    """The prose sentences of reStructuredText or pydoc text.

    Left out: doctests and prompts, literal and code blocks, grammar, tables, headings and their underlines, option
    lists and whatever else is not mostly words. Markup of roles, emphasis, bullets and field lists is removed.
    """
    found: list[str] = []
    literal = None  # inside a literal block: what is indented deeper than this
    for block in _blocks(text):
        indent = len(block[0]) - len(block[0].lstrip())
        if literal is not None and indent > literal:
            continue
        opens = _CODE_DIRECTIVE.match(block[0])
        literal = indent if opens or block[-1].rstrip().endswith("::") else None
        if opens or any(_PROMPT.match(line) or _TABLE.match(line) for line in block):
            continue
        if any(_RULE.match(line) for line in block):  # a heading, or a heading and the text right below it
            block = block[max(i for i, line in enumerate(block) if _RULE.match(line)) + 1 :]
        if not block:
            continue
        lead = _FIELD.sub("", _DIRECTIVE.sub("", _BULLET.sub("", block[0])))
        joined = " ".join(" ".join([lead, *block[1:]]).split())
        joined = _ROLE.sub(r"\1", joined)
        joined = _INLINE.sub(lambda match: next(group for group in match.groups() if group), joined)
        joined = re.sub(r"\s*::$", ":", joined)
        found += (sentence for sentence in split_sentences(joined) if _is_prose(sentence))
    return found


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines without a blank line; a list item begins a block of its own."""
    block: list[str] = []
    for line in [*text.expandtabs().split("\n"), ""]:
        if block and (not line.strip() or _BULLET.match(line) or _FIELD.match(line)):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not 4 <= len(words) <= 120 or not (sentence[0].isalpha() or sentence[0] in "\"'“‘("):
        return False
    if sentence[-1] not in ".!?:;)\"'”’" and not sentence[0].isupper():
        return False
    return sum(_WORD.fullmatch(word) is not None for word in words) >= 0.75 * len(words)
