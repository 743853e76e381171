"""Few numbers, honestly: spread over seeds, bootstrap intervals, and what they allow to say (docs/protocol.md, 14 and
15). NumPy and SciPy only."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from plm.randomness import generator

RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """Values of one metric over seeds: mean, standard deviation (n - 1), a 95% t interval from three values on."""

    values: tuple[float, ...]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def n(self) -> int:
        return len(self.values)


def summarise(values: Sequence[float]) -> Summary | None:
    """Summary of the finite values, None if there is none.

    The pretraining run is the unit. One value has no spread; two have a standard deviation but no interval worth
    printing.
    """
    kept = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not kept:
        return None
    mean = math.fsum(kept) / len(kept)
    sd = float(np.std(kept, ddof=1)) if len(kept) > 1 else None
    interval = None
    if len(kept) > 2:
        half = float(stats.t.ppf(0.975, len(kept) - 1)) * sd / math.sqrt(len(kept))
        interval = (mean - half, mean + half)
    return Summary(kept, mean, sd, interval)


def smallest_p(n_seeds: int) -> float:
    """The smallest two-sided p that an exact sign-flip test over `n_seeds` pairs can give: 0.25 for 3, 0.0625 for 5."""
    return min(1.0, 2.0 ** (1 - n_seeds))


def bootstrap_interval(values: np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval of the mean over units (first axis), resampled with replacement; the same every time."""
    values = np.asarray(values, np.float64)
    draws = generator("bootstrap", len(values), resamples).integers(len(values), size=(resamples, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p of the exact sign-flip test of a mean of paired differences: the part of all sign patterns whose mean
    is as far from 0. More than 16 values: of 100,000 random patterns."""
    x = np.asarray(values, np.float64)
    if len(x) <= 16:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    else:
        signs = generator("sign flips", len(x)).choice((1.0, -1.0), size=(100_000, len(x)))
    means = np.abs(signs @ x)
    return float(np.mean(means >= abs(x.sum()) * (1 - 1e-12)))


def holm(p_values: Sequence[float], size: int = 0) -> list[float]:
    """Adjusted p values of a family of tests (Holm 1979), in the given order.

    size: of the family, where some of its tests are still to come.
    """
    order, size = np.argsort(p_values, kind="stable"), size or len(p_values)
    adjusted, least = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (size - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


@dataclass(frozen=True)
class Term:
    """A cell of a contrast. values: [seeds][heads], the paired pretraining runs in one order. counts: as `values`,
    float64 [examples, 2] whose sums' ratio times `factor` a value is; None: examples are not resampled. examples: equal
    for terms that count the same ones, which are resampled together."""

    weight: float
    values: Sequence[Sequence[float]]
    counts: Sequence[Sequence[np.ndarray]] | None = None
    examples: int = 0
    factor: float = 1.0

    @property
    def means(self) -> np.ndarray:
        """[seeds]: over heads."""
        return np.array([np.mean(heads) for heads in self.values])


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of cells. by_seed: of each pretraining run; interval: 95%, narrow: 90%, of the crossed bootstrap;
    p: of the sign-flip test; over_examples: whether examples were resampled too; half_over_runs: half the width of the
    95% interval over runs alone, None where that is the interval."""

    estimate: float
    by_seed: tuple[float, ...]
    interval: tuple[float, float] | None
    narrow: tuple[float, float] | None
    p: float
    over_examples: bool
    half_over_runs: float | None = None


def contrast(terms: Sequence[Term], *, resamples: int = RESAMPLES) -> Contrast:
    """Of cells whose runs are paired: the crossed bootstrap draws pretraining runs and, where all terms have counts,
    examples, each with replacement and independently of each other. The same every time.

    Intervals from three runs on: two cannot tell how far runs are apart.
    """
    n_seeds = len(terms[0].values)
    by_seed = sum(term.weight * term.means for term in terms)
    over_examples = all(term.counts is not None for term in terms)
    estimate, values = float(np.mean(by_seed)), tuple(map(float, by_seed))
    p = sign_flip_p(values)
    if n_seeds < 3:
        return Contrast(estimate, values, None, None, p, over_examples)
    draws = generator("crossed bootstrap", n_seeds, resamples)
    seeds = draws.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples) / n_seeds
    found, half_over_runs = seeds @ by_seed, None
    if over_examples:
        low, high = np.quantile(found, [0.025, 0.975])
        half_over_runs = float(high - low) / 2
        found = np.zeros(resamples)
        for key in dict.fromkeys(term.examples for term in terms):
            own = [term for term in terms if term.examples == key]
            found += np.sum(seeds * _over_examples(own, resamples), axis=1)
    low, low_narrow, high_narrow, high = np.quantile(found, [0.025, 0.05, 0.95, 0.975])
    interval, narrow = (float(low), float(high)), (float(low_narrow), float(high_narrow))
    return Contrast(estimate, values, interval, narrow, p, over_examples, half_over_runs)


def _over_examples(terms: Sequence[Term], resamples: int, at_once: int = 2_000_000) -> np.ndarray:
    """[resamples, seeds]: the weighted sum of terms that count the same examples, these drawn anew each time."""
    n_examples = len(terms[0].counts[0][0])
    draws = generator("examples", n_examples, resamples)
    step = max(1, at_once // n_examples)
    parts = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        chosen = draws.integers(n_examples, size=(size, n_examples))
        times = np.stack([np.bincount(row, minlength=n_examples) for row in chosen]).astype(np.float64)
        total = 0.0
        for term in terms:
            by_seed = []
            for heads in term.counts:
                sums = times @ np.concatenate(heads, axis=1)  # [size, 2 x heads]
                ratios = sums[:, ::2] / np.maximum(sums[:, 1::2], 1e-12)
                by_seed.append(term.factor * ratios.mean(axis=1))
            total = total + term.weight * np.stack(by_seed, axis=1)
        parts.append(total)
    return np.concatenate(parts)


FEWEST_SEEDS = 5  # pretraining runs, below which there is no verdict (protocol 8)
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Verdict:
    """word: reproduced, reversed, equivalent, inconclusive, or "no verdict"; seeds: pretraining runs that an interval
    of this effect and spread would need to leave 0 out, where the word is inconclusive, None where no number of them is
    enough for so few examples; small: the effect is there, but below the smallest one of interest."""

    word: str
    seeds: int | None = None
    small: bool = False

    def text(self) -> str:
        if self.word != "inconclusive":
            return self.word + (", an effect too small to matter" if self.small else "")
        if self.seeds is None:
            return f"{self.word} (would need more examples, not seeds alone)"
        about = f"about {self.seeds:,}" if self.seeds < MOST_SEEDS else f"{MOST_SEEDS:,} or more"
        return f"{self.word} (would need {about} seeds)"


def verdict(found: Contrast, smallest: float) -> Verdict:
    """What a contrast says of a claim that it is above 0 (protocol 15). smallest: the smallest effect of interest."""
    if len(found.by_seed) < FEWEST_SEEDS or found.interval is None:
        return Verdict("no verdict")
    (low, high), (low_narrow, high_narrow) = found.interval, found.narrow
    small = abs(found.estimate) < smallest
    if low > 0:
        return Verdict("reproduced", small=small)
    if high < 0:
        return Verdict("reversed", small=small)
    if -smallest < low_narrow and high_narrow < smallest:
        return Verdict("equivalent")
    # Of the interval's half width the runs' part shrinks with the root of their number, the examples' part does not.
    half = (high - low) / 2
    over_runs = half if found.half_over_runs is None else min(found.half_over_runs, half)
    left = found.estimate**2 - (half**2 - over_runs**2)
    if left <= 0:
        return Verdict("inconclusive")
    needed = math.ceil(min(len(found.by_seed) * over_runs**2 / left, MOST_SEEDS))
    return Verdict("inconclusive", max(needed, len(found.by_seed) + 1))
