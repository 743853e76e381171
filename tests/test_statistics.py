"""What few numbers allow to say: contrasts, their bootstrap, the exact test, Holm's correction and the verdicts."""

import numpy as np
import pytest

from plm.reporting.statistics import Contrast, Term, contrast, holm, sign_flip_p, smallest_p, verdict


def values(*by_seed: float) -> list[list[float]]:
    return [[value] for value in by_seed]


def test_the_exact_test_is_exact():
    assert sign_flip_p([1, 2, 3, 4, 5]) == smallest_p(5) == 0.0625
    assert sign_flip_p([1, -1]) == 1.0
    # Of the eight patterns of 3, 1, -1 the sums' sizes are 3, 5, 1, 3, 3, 1, 5, 3: six are at least 3.
    assert sign_flip_p([3, 1, -1]) == 0.75
    many = sign_flip_p(np.linspace(-1, 1.2, 40))
    assert 0.2 < many < 0.7


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_contrast_pairs_runs():
    """What both arms share from seed to seed is no uncertainty."""
    a, b = values(70, 75, 80, 72, 78), values(68.9, 74.1, 79, 71, 77)
    found = contrast([Term(1.0, a), Term(-1.0, b)])
    assert found.estimate == pytest.approx(1.0)
    assert found.by_seed == pytest.approx((1.1, 0.9, 1.0, 1.0, 1.0))
    low, high = found.interval
    assert 0.9 <= low < 1.0 < high <= 1.1
    assert found.p == 0.0625
    assert not found.over_examples
    assert contrast([Term(1.0, a), Term(-1.0, b)]) == found, "the same every time"


def test_head_seeds_are_averaged_and_the_run_is_the_unit():
    found = contrast([Term(1.0, [[1.0, 3.0], [2.0, 4.0], [0.0, 2.0]])])
    assert found.by_seed == (2.0, 3.0, 1.0)
    assert contrast([Term(1.0, [[1.0, 3.0], [2.0, 4.0]])]).interval is None, "two runs have no interval"


def right_or_wrong(rng, n: int, share: float) -> np.ndarray:
    return np.stack([rng.random(n) < share, np.ones(n)], axis=1).astype(float)


def test_examples_are_resampled_too():
    """Runs that agree to a hair still are of a sample of examples: the interval is about that of a proportion."""
    rng = np.random.default_rng(0)
    one = right_or_wrong(rng, 400, 0.7)
    counts = [[one] for _ in range(5)]
    term = Term(1.0, values(*[100 * one[:, 0].mean()] * 5), counts, examples=1, factor=100.0)
    found = contrast([term])
    half = 196 * np.sqrt(0.7 * 0.3 / 400)
    assert found.over_examples
    assert (found.interval[1] - found.interval[0]) / 2 == pytest.approx(half, rel=0.15)
    assert np.mean(found.interval) == pytest.approx(found.estimate, abs=0.3)
    # Two arms on the same examples: where both are right and wrong together there is nothing left.
    same = contrast([term, Term(-1.0, term.values, counts, examples=1, factor=100.0)])
    assert same.interval == pytest.approx((0.0, 0.0), abs=1e-9)
    other = right_or_wrong(rng, 400, 0.7)
    apart = Term(-1.0, values(*[100 * other[:, 0].mean()] * 5), [[other]] * 5, examples=2, factor=100.0)
    wide = contrast([term, apart])
    assert (wide.interval[1] - wide.interval[0]) / 2 == pytest.approx(half * np.sqrt(2), rel=0.2)


def test_a_ratio_is_resampled_as_a_ratio():
    """F1 is 2 tp / (gold + predicted) over all examples, not the mean of examples' own."""
    rng = np.random.default_rng(1)
    counts = np.stack([2.0 * (rng.random(300) < 0.3), rng.integers(0, 4, 300)], axis=1)
    value = 100 * counts[:, 0].sum() / counts[:, 1].sum()
    found = contrast([Term(1.0, values(value, value, value), [[counts]] * 3, examples=1, factor=100.0)])
    assert np.mean(found.interval) == pytest.approx(value, rel=0.03)


def test_the_interval_holds_what_it_promises():
    """Of 200 samples of six paired runs about 95% (a percentile bootstrap of so few: somewhat less) hold the truth."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = contrast([Term(1.0, values(*rng.normal(1.0, 1.0, 6)))], resamples=500).interval
        hits += low <= 1.0 <= high
    assert 0.8 <= hits / 200 <= 0.98


def made(interval, narrow, n=5, estimate=0.0, half_over_runs=None) -> Contrast:
    return Contrast(estimate, (estimate,) * n, interval, narrow, 0.0625, True, half_over_runs)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (made((0.1, 3.0), (0.3, 2.5), estimate=1.5), "reproduced"),
        (made((-3.0, -0.1), (-2.5, -0.3), estimate=-1.5), "reversed"),
        (made((-0.9, 1.1), (-0.6, 0.9), estimate=0.1), "equivalent"),
        (made((-3.0, 4.0), (-2.0, 3.0), estimate=0.5), "inconclusive"),
        (made((0.1, 3.0), (0.3, 2.5), n=4, estimate=1.5), "no verdict"),
    ],
)
def test_verdicts(found, word):
    assert verdict(found, smallest=1.0).word == word


def test_how_many_seeds_it_would_need():
    """The half width 3.5 of five runs must become 0.5: 49 times as many."""
    found = verdict(made((-3.0, 4.0), (-2.0, 3.0), estimate=0.5), smallest=1.0)
    assert found.seeds == 245
    assert found.text() == "inconclusive (would need about 245 seeds)"
    assert verdict(made((-3.0, 3.1), (-2.0, 3.0), estimate=0.01), 1.0).text().endswith("1,000 or more seeds)")


def test_seeds_do_not_make_up_for_few_examples():
    """Half widths 4 over runs and 3 over examples, 5 together: an effect of 3.5 needs 16 / (3.5^2 - 9) times the runs;
    one of 2.5 is less than the examples' part."""
    interval = {"interval": (-1.5, 8.5), "narrow": (-0.7, 7.7), "half_over_runs": 4.0}
    assert verdict(made(**interval, estimate=3.5), smallest=1.0).seeds == 25
    found = verdict(made((-2.5, 7.5), (-1.7, 6.7), estimate=2.5, half_over_runs=4.0), smallest=1.0)
    assert found.text() == "inconclusive (would need more examples, not seeds alone)"


def test_the_runs_part_of_an_interval_is_that_without_examples():
    rng = np.random.default_rng(3)
    counts = [[right_or_wrong(rng, 50, share)] for share in (0.5, 0.6, 0.7, 0.8, 0.9)]
    scores = values(*(100 * own[0][:, 0].mean() for own in counts))
    with_examples = contrast([Term(1.0, scores, counts, examples=1, factor=100.0)])
    low, high = contrast([Term(1.0, scores)]).interval
    assert with_examples.half_over_runs == pytest.approx((high - low) / 2, rel=0.1)
    assert with_examples.interval[1] - with_examples.interval[0] > high - low
    assert contrast([Term(1.0, scores)]).half_over_runs is None


def test_an_effect_below_the_smallest_of_interest_is_said_to_be_small():
    assert (
        verdict(made((0.1, 1.1), (0.2, 1.0), estimate=0.6), 1.0).text() == "reproduced, an effect too small to matter"
    )
    assert verdict(made((0.1, 3.0), (0.3, 2.5), estimate=1.5), 1.0).text() == "reproduced"
