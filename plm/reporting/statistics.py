"""Few numbers, honestly: spread over seeds and bootstrap intervals. NumPy and SciPy only."""

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
