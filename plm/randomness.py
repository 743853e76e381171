"""Named random numbers: every draw is a function of (seed, name, step, row), never of a stream's history.

The host half is here (NumPy's counter-based Philox); the device half (`jax.random.fold_in` along the same names) is
`plm.models.layers.Noise`. Python's own `hash` is salted per process and is never used.
"""

import hashlib

import numpy as np


def stable_hash(*parts, bits: int = 32) -> int:
    """A non-negative `bits`-bit integer (up to 128) that depends only on the printed parts, on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)


def generator(*parts) -> np.random.Generator:
    """A generator of its own for the printed parts, for example `generator(seed, "pairs", duplicate)`."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*parts, bits=128)))


def row_uniforms(*parts, rows: range, width: int) -> np.ndarray:
    """Uniforms in [0, 1), float64 [len(rows), width]; row r is the same whatever range it is asked in.

    Philox makes four 64-bit numbers per counter value, so row r owns the counters from r * ceil(width / 4) on and a
    process jumps straight to the rows that its devices hold.
    """
    if rows.step != 1:
        raise ValueError(f"rows must be consecutive, not {rows}")
    blocks = -(-width // 4)
    philox = np.random.Philox(key=stable_hash(*parts, bits=128)).advance(rows.start * blocks)
    return np.random.Generator(philox).random((len(rows), blocks * 4))[:, :width]
