"""Intervals against scipy's, and their coverage; the bootstrap; repetition."""
import math

import numpy as np
import pytest

from stentor.statistics import (
    bootstrap, proportion, repetition, resampled_means, standard_error, wilson)


def test_wilsons_interval_is_the_textbooks_and_covers():
    from scipy.stats import binomtest
    for right, n in ((0, 10), (5, 50), (130, 500), (67, 67), (0, 18), (17, 35), (1, 1)):
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 18) == pytest.approx((0, 0.1759), abs=1e-3)                  # z^2 / (n + z^2)
    assert proportion(17, 35) == pytest.approx({"share": 0.4857, "low": 0.330, "high": 0.644}, abs=2e-3)
    drawn = np.random.default_rng(1).binomial(500, 0.26, 2000)
    covered = sum(low <= 0.26 <= high for low, high in (wilson(int(right), 500) for right in drawn))
    assert 0.93 < covered / 2000 < 0.97


def test_wilsons_interval_takes_halves_and_both_ends():
    """Ties share a point: a half lies between the whole numbers beside it, at either end too."""
    for n in (1, 5, 100):
        whole = [wilson(right, n) for right in range(n + 1)]
        assert whole[0][0] == 0 and whole[-1][1] == 1, "exactly, not but for rounding"
        for right, (below, above) in enumerate(zip(whole, whole[1:])):
            half = wilson(right + 0.5, n)
            assert below[0] < half[0] < above[0] and below[1] < half[1] < above[1]
            assert half[0] < (right + 0.5) / n < half[1]
    assert all(map(math.isnan, (*wilson(0, 0), *proportion(0, 0).values())))


def test_the_bootstrap_agrees_with_the_standard_error():
    items = np.random.default_rng(0).normal(0.4, 0.1, 400)
    error = standard_error(items)
    assert error == pytest.approx(items.std(ddof=1) / 20) and math.isnan(standard_error([1.0]))
    low, high = bootstrap(items, 2_000)
    assert low == pytest.approx(items.mean() - 1.96 * error, abs=error / 4)
    assert high == pytest.approx(items.mean() + 1.96 * error, abs=error / 4)
    assert (low, high) == bootstrap(items, 2_000), "the same every time"
    assert resampled_means(items, 50).std() == pytest.approx(error, rel=0.5)


def test_repetition_is_the_share_of_triples_seen_before():
    assert repetition("a b c d e f") == 0 and repetition("a b c") == 0 and repetition("") == 0
    assert repetition("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repetition("A b, c! " * 9) > 0.8
