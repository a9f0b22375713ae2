"""Mean and spread over seeds, and differences between two variants that share seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator
from scipy import stats

CONFIDENCE = 0.95

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that JSON has as null where it is NaN."""


@dataclass(frozen=True)
class Spread:
    """A value over n seeds; NaN where there are too few.

    Attributes:
        sd: Sample standard deviation.
        low, high: Confidence interval of the mean by Student's t.
    """

    n: int
    mean: Number
    sd: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline, over the n seeds that both have, as in `Spread`.

    `p` is that of the two-sided paired t-test; NaN with fewer than 2 seeds, or if all differences are equal.
    """

    n: int
    mean: Number
    low: Number
    high: Number
    p: Number


def spread(values: Sequence[float]) -> Spread:
    """Compute mean, standard deviation and confidence interval."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Spread(n, mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Compare values with the baseline's, both by seed, with a paired t-test."""
    seeds = [seed for seed in values if seed in baseline]
    own, other = [values[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    s = spread([a - b for a, b in zip(own, other, strict=True)])
    # Without any spread, as when a recipe is compared with itself, the test would divide by zero.
    p = float(stats.ttest_rel(own, other).pvalue) if s.sd > 0 else math.nan
    return Difference(s.n, s.mean, s.low, s.high, p)
