"""95 % intervals over restarts: bootstrap percentiles of a fixed seed, pairs kept together, and exact binomial ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES, SEED = 10_000, 0
FEWEST = 5  # pairs: the percentiles of fewer are far too narrow


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    @property
    def in_points(self) -> str:
        """A difference of accuracies in points; bold where its interval excludes zero."""
        text = f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


def difference(values: Sequence[float], baseline: Sequence[float]) -> Interval | None:
    """The mean of ``values[i] - baseline[i]``; None for fewer than ``FEWEST`` pairs."""
    if len(values) < FEWEST:
        return None
    paired = np.subtract(values, baseline)
    return _percentiles(float(paired.mean()), paired[_resamples(len(paired))].mean(axis=1))


def spread_ratio(values: Sequence[float], baseline: Sequence[float]) -> Interval | None:
    """The standard deviation of ``values`` over that of ``baseline``, restarts resampled together.

    None for fewer than ``FEWEST`` pairs, and for a baseline of one value.
    """
    if len(values) < FEWEST or len(set(baseline)) == 1:
        return None
    rows = _resamples(len(values))
    first, second = (np.asarray(of)[rows].std(axis=1, ddof=1) for of in (values, baseline))
    usable = second > 0  # not of one restart alone
    return _percentiles(float(np.std(values, ddof=1) / np.std(baseline, ddof=1)), first[usable] / second[usable])


def share(count: int, total: int) -> Interval:
    """``count / total``, with the exact interval of Clopper and Pearson."""
    found = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    return Interval(count / total, found.low, found.high)


def _resamples(count: int) -> np.ndarray:
    """Row numbers ``[RESAMPLES, count]``, the same for all statistics of as many rows."""
    return np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))


def _percentiles(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(value, float(low), float(high))
