"""Statistics over seeds, checked by hand."""

from __future__ import annotations

import math

import pytest

from trainer.sweep.statistics import paired, spread


def test_statistics_by_hand() -> None:
    """With two degrees of freedom Student's t has a closed form: p = 1 - t / sqrt(t^2 + 2)."""
    d = paired({1: 1.9, 2: 2.0, 3: 2.4, 9: 5.0}, {1: 2.0, 2: 2.2, 3: 2.5, 4: 1.0})
    t = 4.0  # differences -0.1, -0.2, -0.1: mean -2/15, standard deviation 1/sqrt(300), standard error 1/30
    assert d.n == 3 and d.mean == pytest.approx(-2 / 15)
    assert d.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert (d.low, d.high) == pytest.approx((-2 / 15 - quantile / 30, -2 / 15 + quantile / 30))
    s = spread([1.0, 2.0, 6.0])
    assert (s.n, s.mean, s.sd) == (3, 3.0, pytest.approx(math.sqrt(7)))
    assert s.high - s.mean == pytest.approx(quantile * math.sqrt(7 / 3))


def test_statistics_of_little() -> None:
    one = paired({0: 1.0}, {0: 3.0})
    assert (one.n, one.mean) == (1, -2.0) and math.isnan(one.p) and math.isnan(one.low)
    none = paired({0: 1.0}, {1: 1.0})
    assert none.n == 0 and math.isnan(none.mean)
    assert math.isnan(spread([1.0]).sd) and math.isnan(spread([]).mean)
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0) and math.isnan(same.p)
