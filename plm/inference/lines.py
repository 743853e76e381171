"""A text file of any size, plain, .gz or .xz, as numbered lines: checked once as a whole, then read from any line."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator

from plm.data.text_files import opened
from plm.errors import UserError

LONGEST = 64 << 10  # bytes of a line
_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Facts:
    """digest: of the decompressed bytes; bytes: their number; lines: with text in them; documents: what blank lines
    separate."""

    digest: str
    bytes: int
    lines: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Line:
    """number: from 0; stop: byte at which the next line begins; text: without the line break, "" for a blank line."""

    number: int
    stop: int
    text: str


def check(path: str) -> Facts:
    """Reads a file once.

    Errors: UserError naming the line for what is no UTF-8, has NUL bytes or is longer than `LONGEST`; for a file that
    is not there, holds no text or cannot be decompressed.
    """
    digest = hashlib.blake2b(digest_size=16)
    lines = documents = size = 0
    inside = False
    for line in read(path, digest):
        size = line.stop
        lines += bool(line.text)
        documents += bool(line.text) and not inside
        inside = bool(line.text)
    if not lines:
        raise UserError(f"{path} holds no text: a sentence a line, blank lines between documents, would be right")
    return Facts(digest.hexdigest(), size, lines, documents)


def read(path: str, digest=None, *, number: int = 0, start: int = 0) -> Iterator[Line]:
    """The lines from number `number` on, which begins at byte `start`; every byte that is read goes into `digest`."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    try:
        with opened(path) as stream:
            stream.seek(start)
            while raw := stream.readline(LONGEST + 1):
                if digest is not None:
                    digest.update(raw)
                start += len(raw)
                yield Line(number, start, _text(path, number, raw))
                number += 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _text(path: str, number: int, raw: bytes) -> str:
    where = f"{path}, line {number + 1}"
    if len(raw) > LONGEST:
        raise UserError(f"{where} is longer than {LONGEST:,} bytes: one sentence a line would be right")
    if b"\0" in raw:
        raise UserError(f"{where} has a NUL byte: UTF-8 text would be right (this is another encoding, or no text)")
    try:
        text = (raw.removeprefix(_MARK) if not number else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of it is no UTF-8: UTF-8 text would be right") from None
    return text.rstrip("\r\n") if text.strip() else ""
