"""Mean and spread over seeds, and differences between two variants that have the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        n: how many seeds.
        mean: NaN without any.
        sd: standard deviation (n - 1); NaN with fewer than 2.
        low, high: confidence interval of the mean by Student's t; NaN with fewer than 2.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline, over the seeds that both have.

    Attributes:
        n: how many these are.
        mean, low, high: of the differences, as in `Spread`.
        p: of the paired t-test, two-sided; NaN with fewer than 2 seeds, or where all differences are the same number.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and confidence interval."""
    n = len(values)
    if n == 0:
        return Spread(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    if n == 1:
        return Spread(1, mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Values and the baseline's by seed, compared by the paired t-test."""
    seeds = [seed for seed in values if seed in baseline]
    own, other = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    s = spread([a - b for a, b in zip(own, other, strict=True)])
    # Without spread the statistic is a division by zero; the same recipe twice comes to that.
    p = float(stats.ttest_rel(own, other).pvalue) if s.sd > 0 else math.nan
    return Difference(s.n, s.mean, s.low, s.high, p)
