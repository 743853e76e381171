"""Rows of ids as few padded shapes, spread over all devices there are."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SHORTEST = 16  # tokens of the smallest shape
BATCH_TOKENS = {"cpu": 1024}  # rows x tokens of a full batch on one device, about
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
    """The padded length of n tokens: 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ..., at most `longest`."""
    step = max(power_of_two(n) // 8, SHORTEST // 4)
    width = max(SHORTEST, -(-n // step) * step)
    return width if longest is None else min(width, longest)


def padded_rows(n: int) -> int:
    """Rows of the shape that holds n: 1 to 8, 10, 12, 14, 16, 20, ..., the same number on each device."""
    step = math.lcm(max(power_of_two(n) // 8, 1), mesh().size)
    return -(-n // step) * step


def batches(lengths: Sequence[int], longest: int | None = None) -> Iterator[tuple[list[int], int, int]]:
    """(indices, rows, width) of batches, shortest first.

    Each width has one number of rows, and all batches but the last are full: what does not fill a batch of its own
    width is read with longer texts, so that a few short ones among them neither run nor compile by themselves.
    """
    tokens = BATCH_TOKENS.get(jax.default_backend(), ACCELERATOR_TOKENS) * mesh().size
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    widths = np.array([bucket(lengths[index], longest) for index in order])
    ends = {int(width): int(np.searchsorted(widths, width, side="right")) for width in np.unique(widths)}
    at = 0
    for width, end in ends.items():
        rows = padded_rows(max(tokens // width, 1))
        while end - at >= rows:
            yield order[at : at + rows], rows, width
            at += rows
    if at < len(order):
        rest = order[at:]
        yield rest, padded_rows(len(rest)), int(widths[-1])


def pad(ids: Sequence[Sequence[int]], rows: int, width: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [rows, width], int32 [rows] lengths). Rows that only pad count as one token: a softmax over nothing is
    not a number."""
    tokens = np.full((rows, width), padding, np.int64)
    length = np.ones(rows, np.int32)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = text
        length[row] = max(len(text), 1)
    return tokens, length
