"""Validation loss as a law of size: of the pool, of the active parameters, of depth.

A law is loss = level + sum over factors of slope * ((x / centre)^-exponent - 1) / exponent. This is the power law
E + sum of A * x^-exponent with A = slope / exponent * centre^exponent and E = level - sum of slope / exponent: `slope`
says by how much the loss falls near `centre` as log x grows by one. With exponent -> 0 a term is a straight line in
log x, with slope 0 it is absent, so all three forms belong to one family and can be told apart.

Uncertainty comes from a parametric bootstrap over runs. What all runs of a seed share (the order of the data) shifts
every point alike and is removed first; what remains, the distance of the runs from the law, has one standard deviation
for all. Every replicate draws that deviation (few runs leave it uncertain: chi-squared), then new means, and is fitted.
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
"""Range in which an exponent is sought. Below 0 the loss falls faster and faster, which noisy data may well suggest."""
_STARTS = (-1.5, -0.7, -0.2, 0.15, 0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5)
MISFIT_P = 0.05
"""p-value below which the points are said not to lie on the law."""


@dataclass(frozen=True)
class Curve:
    """A fitted law.

    Attributes:
        level: Loss where every factor is at its centre.
        slopes, exponents: One for each factor; exponent 0 is a straight line in log x.
    """

    level: float
    slopes: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, u_nK: Floats) -> Floats:
        """Return the loss at u = log(x / centre)."""
        terms = [s * basis(u_nK[:, k], a) for k, (s, a) in enumerate(zip(self.slopes, self.exponents, strict=True))]
        return np.asarray(self.level + sum(terms))

    @property
    def floor(self) -> float:
        """E, the loss for unbounded sizes; -inf if a term has no limit."""
        terms = [(s, a) for s, a in zip(self.slopes, self.exponents, strict=True) if s != 0]
        return -math.inf if any(a <= 0 for _, a in terms) else self.level - sum(s / a for s, a in terms)

    def reach(self, loss: float, factor: int, others: Sequence[float]) -> float:
        """Return the u of a factor at which the law falls to `loss`, given the others; inf if it never does."""
        s, a = self.slopes[factor], self.exponents[factor]
        if s <= 0:
            return math.inf
        at = np.array([others], dtype=float)
        at[0, factor] = 0.0  # where the factor's own term vanishes
        v = (loss - float(self(at)[0])) / s
        if a == 0:
            return -v
        # Beyond the limit of the curve: never reached, or, with a negative exponent, reached by any size.
        return -math.log1p(a * v) / a if a * v > -1 else math.copysign(math.inf, a)


def basis(u: Floats, exponent: float) -> Floats:
    """Return (e^(-exponent u) - 1) / exponent, which tends to -u at 0."""
    return np.asarray(-u if exponent == 0 else np.expm1(-exponent * u) / exponent)


def fit(u_nK: Floats, losses_nB: Floats, runs_n: Floats, forms: Sequence[Form]) -> list[Curve]:
    """Fit a law to every column of losses by least squares, weighted by runs.

    For given exponents the law is linear. The exponents are first sought on a grid, for all columns at once, and then
    refined. `u_nK` is log(x / centre) of n points and K factors, `forms` has the form of each factor's term.
    """
    weights_n1 = np.sqrt(runs_n)[:, None]
    targets_nB = weights_n1 * losses_nB
    power = [k for k, form in enumerate(forms) if form == "power"]

    def design(exponents: Sequence[float]) -> Floats:
        filled = dict(zip(power, exponents, strict=True))
        columns = [basis(u_nK[:, k], filled.get(k, 0.0)) for k, form in enumerate(forms) if form != "none"]
        return weights_n1 * np.column_stack([np.ones(len(u_nK)), *columns])

    def residuals(exponents: Sequence[float], targets: Floats) -> Floats:
        q, _ = np.linalg.qr(design(exponents))
        return np.asarray(targets - q @ (q.T @ targets))

    grid = list(itertools.product(_STARTS, repeat=len(power)))
    errors_GB = np.array([np.sum(residuals(point, targets_nB) ** 2, axis=0) for point in grid])
    curves = []
    for target_n, start in zip(targets_nB.T, np.argmin(errors_GB, axis=0), strict=True):
        exponents = list(grid[start])
        if power:
            settings = {"xtol": 1e-6, "ftol": 1e-8, "max_nfev": 50}
            exponents = least_squares(residuals, exponents, bounds=EXPONENTS, args=(target_n,), **settings).x.tolist()
        level, *slopes = np.linalg.lstsq(design(exponents), target_n)[0].tolist()
        own_slopes, own_exponents = iter(slopes), iter(exponents)
        curves.append(
            Curve(
                level,
                tuple(0.0 if form == "none" else next(own_slopes) for form in forms),
                tuple(next(own_exponents) if form == "power" else 0.0 for form in forms),
            )
        )
    return curves


def left_out(u_nK: Floats, losses_n: Floats, runs_n: Floats, forms: Sequence[Form]) -> Floats:
    """Predict the loss of each size from all other sizes, and return the errors."""
    errors_n = np.empty(len(u_nK))
    for size in np.unique(u_nK, axis=0):
        own_n = np.all(u_nK == size, axis=1)
        (curve,) = fit(u_nK[~own_n], losses_n[~own_n, None], runs_n[~own_n], forms)
        errors_n[own_n] = curve(u_nK[own_n]) - losses_n[own_n]
    return errors_n


@dataclass(frozen=True)
class Matched:
    """Means of points without what their seeds have in common.

    Attributes:
        means: Mean of each point over all seeds, also where it lacks a seed.
        level_se: Standard error of what all points share.
        seeds: Number of seeds that were matched; 1 if none could be.
        squares, freedom: Sum of squares of the runs about points and seeds, and its degrees of freedom.
    """

    means: Floats
    level_se: float
    seeds: int
    squares: float
    freedom: int


def match_seeds(points: Sequence[dict[int, float]]) -> Matched:
    """Split losses, given by seed for each point, into means of points, effects of seeds and the rest."""
    seeds = sorted({seed for losses in points for seed in losses})
    runs = [(i, seeds.index(seed), loss) for i, losses in enumerate(points) for seed, loss in losses.items()]
    y = np.array([loss for _, _, loss in runs])
    point_np = np.eye(len(points))[[i for i, _, _ in runs]]
    design = np.hstack([point_np, np.eye(len(seeds))[[s for _, s, _ in runs]]])
    solved, _, rank, _ = np.linalg.lstsq(design, y)
    if rank < len(points) + len(seeds) - 1:  # the seeds do not tie all points together
        means = point_np.T @ y / point_np.sum(axis=0)
        return Matched(means, 0.0, 1, float(np.sum((y - point_np @ means) ** 2)), len(y) - len(points))
    effects = solved[len(points) :]
    level_se = float(np.std(effects, ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    squares = float(np.sum((y - design @ solved) ** 2))
    return Matched(solved[: len(points)] + effects.mean(), level_se, len(seeds), squares, len(y) - int(rank))


@dataclass(frozen=True)
class Noise:
    """The distance of a run from the law: its standard deviation in nats, and with how many degrees of freedom.

    `misfit_p` is the p-value of the F-test that the points lie on the law, given the runs' spread; NaN for 1 seed.
    """

    sd: float
    freedom: int
    misfit_p: float


def noise_of(residuals_n: Floats, runs_n: Floats, parameters: int, matched: Matched) -> Noise:
    """Pool the runs' spread about their points with the points' about the law; the latter alone if they disagree."""
    off, off_freedom = float(np.sum(runs_n * residuals_n**2)), len(residuals_n) - parameters
    squares, freedom, p = matched.squares, matched.freedom, math.nan
    if freedom and squares:
        p = float(stats.f.sf(off / off_freedom / (squares / freedom), off_freedom, freedom))
    if math.isnan(p) or p < MISFIT_P:
        squares, freedom = 0.0, 0
    return Noise(math.sqrt((off + squares) / (off_freedom + freedom)), off_freedom + freedom, p)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the percentiles that leave out equal shares on both sides; values may be infinite."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside], method="inverted_cdf")
    return float(low), float(high)
