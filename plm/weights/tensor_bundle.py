"""TensorFlow's checkpoints (`NAME.index` + `NAME.data-00000-of-00001`) as NumPy arrays, without TensorFlow.

No maintained package reads them alone, and TensorFlow is 600 MB that would serve this one format, so here is a strict
reader of what `tf.train.Saver` writes. The index is a sorted string table of LevelDB: blocks of entries whose keys
share prefixes, each block with a checksum, found through a block of blocks that the last 48 bytes point to. The key ""
holds a `BundleHeaderProto`, every other key (a variable's name) a `BundleEntryProto`: type, shape, and where the bytes
lie in the data files, with their checksum. Every checksum of what is read is compared.

Sources: LevelDB's doc/table_format.md; TensorFlow's tensor_bundle.proto, tensor_shape.proto, types.proto.
"""

import functools
import struct
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from plm.errors import UserError

_MAGIC, _FOOTER, _TRAILER = 0xDB4775248B80FB57, 48, 5
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # of types.proto; what checkpoints of models hold


class _DamageError(Exception):
    """The bytes are not those of a checkpoint; the message says what is wrong."""


def read(prefix: epath.Path, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """{name: array} of the variables in the checkpoint `prefix` (without `.index`) whose name is `wanted`.

    Errors: UserError for files that are missing, damaged or hold what is not read (compressed indices, partitioned
    variables, types that are no numbers).
    """
    index = prefix.parent / f"{prefix.name}.index"
    try:
        entries = dict(_entries(_bytes(index)))
        n_shards = _header(entries.pop(b"", None))
        found = {name: _fields(entry) for key, entry in entries.items() if wanted(name := key.decode("utf-8"))}
    except _DamageError as problem:
        raise UserError(f"{index} is no whole index of a TensorFlow checkpoint: {problem}") from None
    except (IndexError, ValueError, struct.error):
        raise UserError(f"{index} is no whole index of a TensorFlow checkpoint: it is damaged or cut short") from None
    shards: dict[int, bytes] = {}
    arrays = {}
    for name, fields in found.items():
        number = _one(fields, 3, 0)
        path = prefix.parent / f"{prefix.name}.data-{number:05d}-of-{n_shards:05d}"
        if number not in shards:
            shards[number] = _bytes(path)
        try:
            arrays[name] = _array(fields, shards[number])
        except _DamageError as problem:
            raise UserError(f"{path}: {name} {problem}") from None
    return arrays


def _bytes(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


# --------------------------------------------------------------------------------------------- the sorted string table


def _entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of a table, in order."""
    if len(table) < _FOOTER or struct.unpack("<Q", table[-8:])[0] != _MAGIC:
        raise _DamageError("its last bytes are not a table's")
    at = len(table) - _FOOTER
    for _ in range(2):  # offset and size of the block of properties, which is empty
        _, at = _varint(table, at)
    for _, handle in _block(table, at):
        yield from _block(handle, 0, table)


def _block(handle: bytes, at: int, table: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of the block whose offset and size stand at `at` of `handle`, a part of `table` or all of it."""
    table = handle if table is None else table
    offset, at = _varint(handle, at)
    size, _ = _varint(handle, at)
    content, trailer = table[offset : offset + size], table[offset + size : offset + size + _TRAILER]
    if len(trailer) < _TRAILER:
        raise _DamageError("it is cut short")
    compression, checksum = struct.unpack("<BI", trailer)
    if checksum != _masked(crc32c(content + trailer[:1])):
        raise _DamageError("a checksum is wrong")
    if compression:
        raise _DamageError("it is compressed, as TensorFlow 1.1 alone wrote it: save it again with a later one")
    (n_restarts,) = struct.unpack("<I", content[-4:])
    end, at, key = len(content) - 4 * (n_restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(content, at)
        unshared, at = _varint(content, at)
        length, at = _varint(content, at)
        key = key[:shared] + content[at : at + unshared]
        at += unshared
        yield key, content[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends) of a number written in groups of 7 bits, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


# ------------------------------------------------------------------------------------------------------ its messages


def _fields(message: bytes) -> dict[int, list]:
    """{field number: its values} of a protocol buffer: int for numbers, bytes for what has a length."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise _DamageError("an entry is no protocol buffer")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _one(fields: dict[int, list], number: int, default):
    return fields.get(number, [default])[-1]


def _header(message: bytes | None) -> int:
    """The number of data files."""
    if message is None:
        raise _DamageError("it has no header")
    fields = _fields(message)
    if _one(fields, 2, 0) != 0:
        raise _DamageError("its numbers are big-endian")
    return _one(fields, 1, 0)


def _array(fields: dict[int, list], data: bytes) -> np.ndarray:
    """The array of a `BundleEntryProto`: dtype 1, shape 2, shard 3, offset 4, size 5, crc32c 6, slices 7."""
    if 7 in fields:
        raise _DamageError("is stored in slices (a partitioned variable), which are not read: save it whole")
    dtype = _TYPES.get(_one(fields, 1, 0))
    if dtype is None:
        raise _DamageError(f"has type {_one(fields, 1, 0)} of TensorFlow's types.proto, and only numbers are read")
    shape = [_one(_fields(dim), 1, 0) for dim in _fields(_one(fields, 2, b"")).get(2, [])]
    offset, size = _one(fields, 4, 0), _one(fields, 5, 0)
    content = data[offset : offset + size]
    if len(content) < size:
        raise _DamageError(f"ends at byte {offset + size:,} and the file at {len(data):,}: it is cut short")
    if size != np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64)):
        raise _DamageError(f"has {size:,} bytes, which shape {shape} does not take")
    if _masked(crc32c(content)) != _one(fields, 6, 0):
        raise _DamageError("is damaged: its checksum is wrong")
    return np.frombuffer(content, dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ CRC-32C

_POLYNOMIAL = np.uint32(0x82F63B78)  # Castagnoli's, bits reversed
_PART = 1024  # bytes that a part is long, a power of two


def _masked(checksum: int) -> int:
    """As it is stored: LevelDB never stores the checksum of data that hold checksums as it is."""
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
    """The remainders of all numbers of 16 bits."""
    values = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        values = (values >> 1) ^ (_POLYNOMIAL * (values & 1))
    return values


def _apply(operator: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A linear map over bits, uint32 [32] (the image of each bit), of values."""
    result = np.zeros_like(values)
    for bit in range(32):
        result ^= operator[bit] * ((values >> np.uint32(bit)) & 1)
    return result


def crc32c(data: bytes) -> int:
    """The CRC-32C (RFC 3720) of bytes, about 100 MB/s.

    It is linear, so all parts of the data go through the table at once, two bytes of each at a time, and are joined
    two by two: what stands before n bytes counts as itself followed by n zeros.
    """
    table = _table()
    n_parts = -(-len(data) // _PART)
    padded = np.zeros(n_parts * _PART, np.uint8)  # zeros in front change nothing
    padded[len(padded) - len(data) :] = np.frombuffer(data, np.uint8)
    parts, remainders = np.zeros(n_parts, np.uint32), np.empty(n_parts, np.uint32)
    for column in padded.view("<u2").reshape(n_parts, _PART // 2).T:
        np.take(table, parts.astype(np.uint16) ^ column, out=remainders, mode="wrap")
        parts >>= 16
        parts ^= remainders
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    zeros = (bits >> 8) ^ table[(bits & 255) << 8]  # the map of one zero byte; squared, of two, four, ...
    start = np.full(1, 0xFFFFFFFF, np.uint32)
    for power in range(max(len(data).bit_length(), 1)):
        if len(data) >> power & 1:
            start = _apply(zeros, start)
        if 1 << power >= _PART and len(parts) > 1:
            parts = np.concatenate([np.zeros(len(parts) % 2, np.uint32), parts])
            parts = _apply(zeros, parts[0::2]) ^ parts[1::2]
        zeros = _apply(zeros, zeros)
    return int(start[0] ^ (parts[0] if len(parts) else 0)) ^ 0xFFFFFFFF
