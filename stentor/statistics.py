"""How sure a figure is: 95% intervals of shares and of means; and how repetitive a text is."""
from __future__ import annotations

import math
import re
from statistics import NormalDist

import numpy as np

REPETITIVE = 1 / 3                                    # of `repetition`: from there a text goes round
Z = NormalDist().inv_cdf(0.975)                       # half a 95% interval, in standard errors


def wilson(right: float, n: int) -> tuple[float, float]:
    """95% interval (low, high) of a proportion: Wilson's score interval; nan where n is 0.

    right: how many of n, from 0 to n, with the parts of a point of items whose best choices tie.
    """
    if n == 0:
        return math.nan, math.nan
    share, shrink = right / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Both ends exactly: rounding misses them by 1e-17.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == n else min(1.0, middle + half)
    return low, high


def proportion(right: float, n: int) -> dict[str, float]:
    """{"share", "low", "high"} of `right` in n, with Wilson's interval; all nan where n is 0."""
    low, high = wilson(right, n)
    return {"share": right / n if n else math.nan, "low": low, "high": high}


def standard_error(items) -> float:
    """Of the mean of `items`; the sample deviation, as lm-eval has it. nan below two items."""
    return float(np.std(items, ddof=1) / math.sqrt(len(items))) if len(items) > 1 else math.nan


def resampled_means(items, resamples: int, seed: int = 0) -> np.ndarray:
    """Bootstrap: the means of `resamples` samples, each of as many items as there are, drawn with
    replacement."""
    items, generator = np.asarray(items, float), np.random.default_rng(seed)
    count = len(items)                                # one sample at a time: memory stays flat
    return np.array([items[generator.integers(0, count, count)].mean() for _ in range(resamples)])


def bootstrap(items, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95% interval (low, high) of the mean of `items`: percentiles of its bootstrap."""
    low, high = np.quantile(resampled_means(items, resamples, seed), (0.025, 0.975))
    return float(low), float(high)


def repetition(text: str) -> float:
    """Share of the words' triples that occurred before in the same text, from 0 to 1; 0 below four
    words."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if len(triples) > 1 else 0.0
