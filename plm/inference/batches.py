"""Rows of ids as few padded shapes, spread over all devices there are."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SHORTEST = 16  # tokens of the smallest shape
BATCH_TOKENS = {"cpu": 4096}  # rows x tokens of a full batch on one device, about
ACCELERATOR_TOKENS = 32768


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """All devices of this process along `data`."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))


def by_rows() -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec("data"))


def everywhere() -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec())


def power_of_two(n: int) -> int:
    return 1 << max(int(n) - 1, 0).bit_length()


def bucket(n: int, longest: int | None = None) -> int:
    """The padded length of n tokens: 16, 24, 32, 48, 64, 96, ..., at most `longest`."""
    above = power_of_two(n)
    width = max(SHORTEST, above * 3 // 4 if n <= above * 3 // 4 else above)
    return width if longest is None else min(width, longest)


def padded_rows(n: int) -> int:
    """Rows of the shape that holds n: a power of two, the same number on each device."""
    devices = mesh().size
    return -(-power_of_two(n) // devices) * devices


def batches(lengths: Sequence[int], longest: int | None = None) -> Iterator[tuple[list[int], int, int]]:
    """(indices, rows, width) of batches, shortest first.

    Each width has one number of rows. What would fill less than half a batch goes to the next width, so that a few
    short texts beside a few long ones neither run nor compile by themselves; only the last batch has fewer rows.
    """
    tokens = BATCH_TOKENS.get(jax.default_backend(), ACCELERATOR_TOKENS) * mesh().size
    by_width: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        by_width.setdefault(bucket(lengths[index], longest), []).append(index)
    waiting: list[int] = []
    for place, (width, indices) in enumerate(by_width.items()):
        waiting += indices
        rows = padded_rows(1 << max((tokens // width).bit_length() - 1, 0))
        last = place == len(by_width) - 1
        while len(waiting) >= rows or (waiting and (last or len(waiting) >= rows / 2)):
            part, waiting = waiting[:rows], waiting[rows:]
            yield part, min(rows, padded_rows(len(part))), width


def pad(ids: Sequence[Sequence[int]], rows: int, width: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [rows, width], int32 [rows] lengths). Rows that only pad count as one token: a softmax over nothing is
    not a number."""
    tokens = np.full((rows, width), padding, np.int64)
    length = np.ones(rows, np.int32)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        length[row] = max(len(text), 1)
    return tokens, length
