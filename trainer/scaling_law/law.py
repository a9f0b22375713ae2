"""Validation loss as a law of size: of the pool, of the active parameters, of depth.

A law is loss = level + sum over factors of slope * ((x / centre)^-exponent - 1) / exponent, the power law
E + sum of A * x^-exponent in another form: `slope` is what the loss falls by near `centre` as log x grows by one, and
exponent -> 0 is the straight line in log x. So "no dependence" and "straight line" are members of the same family, and
can be told from a power law. A = slope / exponent * centre^exponent; E = level - sum of slope / exponent.

Uncertainty is a parametric bootstrap over runs. What all runs of a seed have in common (the order of the data) shifts
every point alike and is taken out first; the rest, runs about the law, is one spread for all of them. Every replicate
draws the spread that so few runs leave open (chi-squared), then all means anew, and is fitted again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import least_squares

from trainer.sweep.statistics import CONFIDENCE

Form = Literal["none", "line", "power"]
Floats = NDArray[np.float64]

EXPONENTS = (-2.0, 6.0)
"""Where an exponent is looked for. Below 0 the loss falls faster and faster: no power law, but data may be so."""
_STARTS = (-1.5, -0.7, -0.2, 0.15, 0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5)
MISFIT_P = 0.05
"""Below it the points are said not to lie on the law."""


@dataclass(frozen=True)
class Curve:
    """A fitted law; slopes and exponents have an entry a factor, exponent 0 is a straight line in log x."""

    level: float
    slopes: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, u_nK: Floats) -> Floats:
        """Loss at u = log(x / centre)."""
        terms = [s * basis(u_nK[:, k], a) for k, (s, a) in enumerate(zip(self.slopes, self.exponents, strict=True))]
        return np.asarray(self.level + sum(terms))

    @property
    def floor(self) -> float:
        """E, the loss of unbounded sizes; -inf where a term has no end."""
        terms = list(zip(self.slopes, self.exponents, strict=True))
        if any(s != 0 and a <= 0 for s, a in terms):
            return -math.inf
        return self.level - sum(s / a for s, a in terms if s != 0)

    def reach(self, loss: float, factor: int, others: Sequence[float]) -> float:
        """The u of one factor at which the law comes down to `loss`; inf: it does not.

        Args:
            others: u of all factors; that of `factor` is not looked at.
        """
        s, a = self.slopes[factor], self.exponents[factor]
        if s <= 0:
            return math.inf
        at = np.array([others], dtype=float)
        at[0, factor] = 0.0  # where the factor's own term is nothing
        level = float(self(at)[0])
        v = (loss - level) / s
        if a == 0:
            return -v
        # Past the end of the curve: never below, or, where the exponent is negative, above it at any size.
        return -math.log1p(a * v) / a if a * v > -1 else math.copysign(math.inf, a)


def basis(u: Floats, exponent: float) -> Floats:
    """(e^(-exponent u) - 1) / exponent, which is -u at 0."""
    return np.asarray(-u if exponent == 0 else np.expm1(-exponent * u) / exponent)


def fit(u_nK: Floats, losses_nB: Floats, runs_n: Floats, forms: Sequence[Form]) -> list[Curve]:
    """Fit every column of losses, by least squares in nats weighted by runs.

    Given the exponents the law is linear; so these are searched on a grid, the same for all columns, then refined.
    """
    weights_n1 = np.sqrt(runs_n)[:, None]
    targets_nB = weights_n1 * losses_nB
    power = [k for k, form in enumerate(forms) if form == "power"]

    def design(exponents: Sequence[float]) -> Floats:
        filled = dict(zip(power, exponents, strict=True))
        columns = [basis(u_nK[:, k], filled.get(k, 0.0)) for k, form in enumerate(forms) if form != "none"]
        return weights_n1 * np.column_stack([np.ones(len(u_nK)), *columns])

    def left(exponents: Sequence[float], targets: Floats) -> Floats:
        q, _ = np.linalg.qr(design(exponents))
        return np.asarray(targets - q @ (q.T @ targets))

    grid = list(itertools.product(_STARTS, repeat=len(power)))
    errors_GB = np.array([np.sum(left(point, targets_nB) ** 2, axis=0) for point in grid])
    curves = []
    for target_n, start in zip(targets_nB.T, np.argmin(errors_GB, axis=0), strict=True):
        exponents = np.array(grid[start])
        if power:
            found = least_squares(
                left, exponents, bounds=EXPONENTS, args=(target_n,), xtol=1e-6, ftol=1e-8, max_nfev=50
            )
            exponents = found.x
        solved = iter(np.linalg.lstsq(design(exponents.tolist()), target_n)[0])
        level = float(next(solved))
        slopes = tuple(0.0 if form == "none" else float(next(solved)) for form in forms)
        filled = dict(zip(power, exponents.tolist(), strict=True))
        curves.append(Curve(level, slopes, tuple(filled.get(k, 0.0) for k in range(len(forms)))))
    return curves


def left_out(u_nK: Floats, losses_n: Floats, runs_n: Floats, forms: Sequence[Form]) -> Floats:
    """Each size's loss as predicted from all other sizes, minus what it is."""
    errors_n = np.empty(len(u_nK))
    for size in np.unique(u_nK, axis=0):
        own_n = np.all(u_nK == size, axis=1)
        (curve,) = fit(u_nK[~own_n], losses_n[~own_n, None], runs_n[~own_n], forms)
        errors_n[own_n] = curve(u_nK[own_n]) - losses_n[own_n]
    return errors_n


@dataclass(frozen=True)
class Matched:
    """Points' means with what its seeds have in common taken out.

    Attributes:
        means: of each point over its seeds; where one lacks a seed, as if it had it.
        level_se: standard error of what all of them share.
        seeds: that were matched; 1: nothing was.
        squares, freedom: of the runs about means and seeds.
    """

    means: Floats
    level_se: float
    seeds: int
    squares: float
    freedom: int


def match_seeds(points: Sequence[dict[int, float]]) -> Matched:
    """Split losses, of points by seed, into points' means, seeds' effects and the rest."""
    seeds = sorted({seed for losses in points for seed in losses})
    runs = [(i, seed, loss) for i, losses in enumerate(points) for seed, loss in losses.items()]
    y = np.array([loss for _, _, loss in runs])
    place = np.eye(len(points))[[i for i, _, _ in runs]]
    seed = np.eye(len(seeds))[[seeds.index(seed) for _, seed, _ in runs]]
    solved, _, rank, _ = np.linalg.lstsq(np.hstack([place, seed]), y)
    if rank < len(points) + len(seeds) - 1:  # no seeds tie all points together
        means = place.T @ y / place.sum(axis=0)
        return Matched(means, 0.0, 1, float(np.sum((y - place @ means) ** 2)), len(y) - len(points))
    means, effects = solved[: len(points)], solved[len(points) :]
    squares = float(np.sum((y - np.hstack([place, seed]) @ solved) ** 2))
    level_se = float(np.std(effects, ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    return Matched(means + effects.mean(), level_se, len(seeds), squares, len(y) - int(rank))


@dataclass(frozen=True)
class Noise:
    """Of a run about the law.

    Attributes:
        sd: nats.
        freedom: degrees of freedom it is known with.
        misfit_p: of the F-test that the points lie on the law, given the spread of the runs; NaN with 1 seed.
    """

    sd: float
    freedom: int
    misfit_p: float


def noise_of(residuals_n: Floats, runs_n: Floats, parameters: int, squares: float, freedom: int) -> Noise:
    """Pool the runs' spread about their points with the points' about the law; the latter alone if they disagree.

    Args:
        squares, freedom: of the runs about their points.
    """
    off, off_freedom = float(np.sum(runs_n * residuals_n**2)), len(residuals_n) - parameters
    if freedom == 0 or squares == 0:
        return Noise(math.sqrt(off / off_freedom), off_freedom, math.nan)
    p = float(stats.f.sf(off / off_freedom / (squares / freedom), off_freedom, freedom))
    if p < MISFIT_P:
        return Noise(math.sqrt(off / off_freedom), off_freedom, p)
    return Noise(math.sqrt((off + squares) / (off_freedom + freedom)), off_freedom + freedom, p)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentiles that leave out as much on both sides; values may be infinite."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside], method="inverted_cdf")
    return float(low), float(high)
