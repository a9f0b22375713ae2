"""Validation loss as a law of size: of the pool, of the active parameters, of depth.

A law is loss = level + sum over factors of slope * ((x / centre)^-exponent - 1) / exponent. This is the power law
E + sum of A * x^-exponent with A = slope / exponent * centre^exponent and E = level - sum of slope / exponent: `slope`
says by how much the loss falls near `centre` as log x grows by one. As the exponent tends to 0, a term becomes a
straight line in log x; with slope 0 it is absent. So all three forms belong to one family and can be told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from trainer.sweep.statistics import CONFIDENCE

Form = Literal["none", "line", "power"]
FORMS: dict[Form, str] = {"none": "no dependence", "line": "straight line", "power": "power law"}
Forms = tuple[Form, ...]
"""The form of each factor's term."""

Floats = NDArray[np.float64]

EXPONENTS = (-2.0, 6.0)
"""Range in which an exponent is sought. Below 0 the loss falls faster and faster, which noisy data may well suggest."""
_STARTS = (-1.5, -0.7, -0.2, 0.15, 0.4, 0.7, 1.0, 1.5, 2.2, 3.2, 4.5)


@dataclass(frozen=True)
class Curve:
    """A fitted law.

    Attributes:
        level: Loss where every factor is at its centre.
        slopes_K, exponents_K: One for each factor; exponent 0 is a straight line in log x.
    """

    level: float
    slopes_K: Floats
    exponents_K: Floats

    def __call__(self, u_nK: Floats) -> Floats:
        """Return the loss at u = log(x / centre)."""
        return np.asarray(self.level + _basis(u_nK, self.exponents_K) @ self.slopes_K)


def _basis(u_nK: Floats, exponents_K: Floats) -> Floats:
    """Return (e^(-exponent u) - 1) / exponent, which tends to -u at 0."""
    straight_K = exponents_K == 0
    return np.where(straight_K, -u_nK, np.expm1(-exponents_K * u_nK) / np.where(straight_K, 1.0, exponents_K))


def fit(u_nK: Floats, losses_nB: Floats, runs_n: Floats, forms: Forms) -> list[Curve]:
    """Fit a law to every column of losses by least squares, weighted by runs.

    For given exponents the law is linear. The exponents are first sought on a grid, for all columns at once, and then
    refined. `u_nK` is log(x / centre) of n points and K factors, `forms` has the form of each factor's term.
    """
    weights_n1 = np.sqrt(runs_n)[:, None]
    targets_nB = weights_n1 * losses_nB
    used = [k for k, form in enumerate(forms) if form != "none"]
    power = [k for k, form in enumerate(forms) if form == "power"]

    def for_all(factors: Sequence[int], values: Floats | Sequence[float]) -> Floats:
        values = np.asarray(values, dtype=np.float64)
        values_K = np.zeros((*values.shape[:-1], len(forms)))
        values_K[..., factors] = values
        return values_K

    def design(exponents: Floats) -> Floats:
        """One design for each point of a grid, or that of a single point."""
        columns = _basis(u_nK, for_all(power, exponents)[..., None, :])[..., used]
        return weights_n1 * np.concatenate([np.ones((*columns.shape[:-1], 1)), columns], axis=-1)

    def residuals(exponents: Floats, targets: Floats) -> Floats:
        q, _ = np.linalg.qr(design(exponents))
        return np.asarray(targets - q @ (q.T @ targets))

    grid_GP = np.array(list(itertools.product(_STARTS, repeat=len(power))))
    # The less of the losses a design explains, the larger its error.
    q_Gnk, _ = np.linalg.qr(design(grid_GP))
    explained_GB = np.sum((q_Gnk.swapaxes(1, 2) @ targets_nB) ** 2, axis=1)
    curves = []
    for target_n, start in zip(targets_nB.T, np.argmax(explained_GB, axis=0), strict=True):
        exponents = grid_GP[start]
        if power:
            settings = {"xtol": 1e-6, "ftol": 1e-8, "max_nfev": 50}
            exponents = least_squares(residuals, exponents, bounds=EXPONENTS, args=(target_n,), **settings).x
        level, *slopes = np.linalg.lstsq(design(exponents), target_n)[0].tolist()
        curves.append(Curve(level, for_all(used, slopes), for_all(power, exponents)))
    return curves


def left_out(u_nK: Floats, losses_n: Floats, runs_n: Floats, forms: Forms) -> float:
    """Predict the loss of each size from all other sizes, and return the root mean square error."""
    errors_n = np.empty(len(u_nK))
    for size in np.unique(u_nK, axis=0):
        own_n = np.all(u_nK == size, axis=1)
        (curve,) = fit(u_nK[~own_n], losses_n[~own_n, None], runs_n[~own_n], forms)
        errors_n[own_n] = curve(u_nK[own_n]) - losses_n[own_n]
    return float(np.sqrt(np.mean(errors_n**2)))


def match_seeds(points: Sequence[dict[int, float]]) -> tuple[Floats, float, int]:
    """Split losses, given by seed for each point, into means of points, effects of seeds and the rest.

    Returns:
        The mean of each point over all seeds, also where it lacks a seed; the sum of squares of the rest, and its
        degrees of freedom. If the seeds do not tie all points together, no effects of seeds are removed.
    """
    seeds = sorted({seed for losses in points for seed in losses})
    runs = [(place, seeds.index(seed)) for place, losses in enumerate(points) for seed in losses]
    y = np.array([loss for losses in points for loss in losses.values()])
    points_np = np.eye(len(points))[[place for place, _ in runs]]
    design = np.hstack([points_np, np.eye(len(seeds))[[seed for _, seed in runs]] - 1 / len(seeds)])
    if np.linalg.matrix_rank(design) < len(points) + len(seeds) - 1:
        design = points_np
    solved, _, rank, _ = np.linalg.lstsq(design, y)
    return solved[: len(points)], float(np.sum((y - design @ solved) ** 2)), len(y) - int(rank)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the percentiles that leave out equal shares on both sides; values may be infinite."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside], method="inverted_cdf")
    return float(low), float(high)
