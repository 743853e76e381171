"""The texts that both sides embed; no JAX and no torch here."""

import random

from tests.benchmarks.sizes import Size

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary(size: Size) -> list[str]:
    """Every word is one piece, so that both sides have the same ids."""
    return [*SPECIALS, *(f"w{number}" for number in range(size.vocabulary - len(SPECIALS)))]


def texts(size: Size, n: int) -> list[str]:
    """Sentences as in running text: lengths log-normal around 20 words, a few very short and very long ones; words by
    Zipf's law, the k-th as often as 1 / k."""
    draw = random.Random(0)
    words = size.vocabulary - len(SPECIALS)
    lengths = (min(max(round(draw.lognormvariate(3.0, 0.6)), 2), size.length) for _ in range(n))
    return [" ".join(f"w{int(words ** draw.random()) - 1}" for _ in range(length)) for length in lengths]
