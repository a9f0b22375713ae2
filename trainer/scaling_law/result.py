"""The law of a family: which terms its data supports, how uncertain they are, and how far they may be trusted.

Uncertainty comes from a parametric bootstrap over runs. What all runs of a seed share (the order of the data) shifts
every point alike and is removed first; what remains, the distance of the runs from the law, has one standard deviation
for all. Every replicate draws that deviation (few runs leave it uncertain: chi-squared), then new means, and is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import stats

from trainer.common.errors import UserError
from trainer.common.format import count, plural
from trainer.scaling_law.law import EXPONENTS, FORMS, Curve, Floats, Form, Forms, fit, interval, left_out, match_seeds
from trainer.scaling_law.points import Family
from trainer.sweep.result import VariantResult

REPLICATES = 1000
FARTHEST = 2.0
"""Largest size that a law may be asked about, as a multiple of the largest measured one."""

_LINE: Form = "line"
_POWER: Form = "power"
_CLEARLY = 0.9
"""A power law, which has one parameter more, must predict sizes left out with this share of a straight line's error."""
_LEVELS = 3
"""Values that a factor must have, since a term has an exponent and a slope besides the common level."""
_ALIKE = 0.9
"""Share of a factor's variance (of its logarithm) explained by others from which on they share one term."""
_STEPS = 1000
"""Sizes, equally far apart in the logarithm, among which the smallest that reaches a loss is sought."""
_MISFIT_P = 0.05
"""p-value of the F-test below which the points do not lie on the law, and the runs' own spread is not used."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; an end is infinite if the data does not bound it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Term:
    """The term of one factor.

    Attributes:
        factor: `experts`, `pool parameters`, `active parameters` or `layers`.
        values: Its measured values, ascending.
        form: What the data supports: no dependence, a straight line in the logarithm, or a power law.
        centre: The value at which the term is zero, see law.py.
        doubling: Change of loss when the factor doubles, from the straight lines.
        exponent: Exponent of the power law, supported or not.
        left_out_rms: Error on sizes left out, root mean square in nats, by the form of this term.
    """

    factor: str
    values: tuple[float, ...]
    form: Form
    centre: float
    doubling: Estimate
    exponent: Estimate
    left_out_rms: dict[Form, float]


@dataclass(frozen=True)
class Crossing:
    """The smallest pool that reaches a baseline's loss.

    Attributes:
        name: Name of the baseline.
        at: Factors besides the pool.
        loss: Loss of the baseline.
        smallest: The pool by the law, sought from the smallest measured one on; infinite beyond FARTHEST. None if the
            loss does not depend on the pool.
    """

    name: str
    at: dict[str, float]
    loss: float
    smallest: Estimate | None


@dataclass(frozen=True)
class Law:
    """The law of a family.

    Attributes:
        x_nK: Sizes of the points by factor.
        curve: The law, in the forms that the data supports.
        replicates: The law as it might have come out with other runs.
        noise: Distance of a run from the law: standard deviation `sd` in nats, and its degrees of `freedom`.
        largest: The largest `size` of the first factor, its `measured` loss, and as `predicted` from smaller sizes.
        combined: Factors without a term of their own, since they vary with another, by that other.
    """

    family: Family
    terms: tuple[Term, ...]
    x_nK: Floats
    curve: Curve
    replicates: Sequence[Curve]
    noise: dict[str, float]
    largest: dict[str, float]
    combined: dict[str, str]
    crossings: tuple[Crossing, ...]


def log_sizes(terms: Sequence[Term], xs: Sequence[float] | Floats, at: dict[str, float]) -> Floats:
    """Return log(x / centre) for sizes of the first factor and one value of each other factor, (n, K)."""
    columns = np.column_stack([xs, *(np.full(len(xs), value) for value in at.values())])
    return np.asarray(np.log(columns / [term.centre for term in terms]))


def factors_of(points: Sequence[VariantResult]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return the values of the factors that vary, point by point, and the factors that vary only with others."""
    expert = [3 * p.hidden * int(p.settings["model.ffn_hidden"]) for p in points]
    experts = [p.experts for p in points]
    wide = len(set(expert)) > 1
    candidates = {
        "pool parameters" if wide else "experts": np.multiply(experts, expert) if wide else experts,
        "active parameters": [p.parameters["active"] for p in points],
        "layers": [p.layers for p in points],
    }
    factors: dict[str, Floats] = {}
    combined: dict[str, str] = {}
    for name, values in candidates.items():
        if len(np.unique(values)) < 2:
            continue
        log = np.log(values)
        others = np.column_stack([np.ones(len(log)), *map(np.log, factors.values())])
        rest = log - others @ np.linalg.lstsq(others, log)[0]
        if factors and np.var(rest) <= (1 - _ALIKE) * np.var(log):
            combined[name] = " and ".join(factors)
        else:
            factors[name] = np.array(values, dtype=float)
    return factors, combined


class _Fitter:
    """Fits laws to the points of a family and draws replicates of them.

    Attributes:
        x_nK, centres_K, u_nK: Values of the factors, their centres, and log(x / centre).
        means_n: Mean losses, as if every point had all seeds; `baselines` has pairs of a baseline and its mean.
        noise: Distance of runs from a law of power laws.
    """

    def __init__(self, family: Family, factors: dict[str, Floats], replicates: int) -> None:
        self.x_nK = np.column_stack(list(factors.values()))
        self.centres_K = np.exp(np.mean(np.log(np.unique(self.x_nK, axis=0)), axis=0))
        self.u_nK = np.log(self.x_nK / self.centres_K)
        self._runs_n = np.array([len(p.runs) for p in family.points], dtype=float)
        others = list({id(b): b for b in family.baselines if b}.values())
        means, squares, freedom = match_seeds([p.losses for p in (*family.points, *others)])
        self.means_n = means[: len(family.points)]
        self.baselines = list(zip(others, means[len(family.points) :].tolist(), strict=True))
        straight: Forms = (_LINE,) * len(factors)
        power = self.fit((_POWER,) * len(factors))
        off = float(np.sum(self._runs_n * (self.means_n - power(self.u_nK)) ** 2))
        self.noise = _noise(off, len(self.u_nK) - 1 - 2 * len(factors), squares, freedom)
        self._random = np.random.default_rng(0)
        deviation_B = self.noise["freedom"] / self._random.chisquare(self.noise["freedom"], replicates)
        self._sd_B = self.noise["sd"] * np.sqrt(deviation_B)
        self.lines = [self.fit(straight), *self._redraw(power, straight)]
        self.replicates = cache(lambda forms: self._redraw(self.fit(forms), forms))
        self.error = cache(lambda forms: left_out(self.u_nK, self.means_n, self._runs_n, forms))

    def fit(self, forms: Forms, chosen: Floats | slice = slice(None)) -> Curve:
        """Fit a law of these forms to all points, or to the chosen ones."""
        return fit(self.u_nK[chosen], self.means_n[chosen, None], self._runs_n[chosen], forms)[0]

    def draw(self, losses_n: Floats, runs_n: Floats) -> Floats:
        """Draw means as they might have come out, (n, replicates)."""
        normal_nB = self._random.standard_normal((len(losses_n), len(self._sd_B)))
        return np.asarray(losses_n[:, None] + self._sd_B * normal_nB / np.sqrt(runs_n)[:, None])

    def _redraw(self, curve: Curve, forms: Forms) -> list[Curve]:
        """Fit laws of these forms to means drawn about a curve."""
        return fit(self.u_nK, self.draw(curve(self.u_nK), self._runs_n), self._runs_n, forms)

    def judge(self, forms: Forms, k: int, name: str) -> Term:
        """Judge the term of the k-th factor, with the others as they are in `forms`."""
        errors: dict[Form, float] = {form: self.error(_with(forms, k, form)) for form in FORMS}
        as_power = _with(forms, k, "power")
        doublings = [-math.log(2) * float(curve.slopes_K[k]) for curve in self.lines]
        doubling = Estimate(doublings[0], *interval(doublings[1:]))
        low, high = interval([curve.exponents_K[k] for curve in self.replicates(as_power)])
        # At the end of the range in which it is sought, an exponent has no bound on that side.
        low = -math.inf if low < EXPONENTS[0] + 0.01 else low
        high = math.inf if high > EXPONENTS[1] - 0.01 else high
        exponent = Estimate(float(self.fit(as_power).exponents_K[k]), low, high)
        values = tuple(np.unique(self.x_nK[:, k]).tolist())
        form = _supported(doubling, exponent, errors)
        return Term(name, values, form, float(self.centres_K[k]), doubling, exponent, errors)


def _with(forms: Forms, k: int, form: Form) -> Forms:
    return (*forms[:k], form, *forms[k + 1 :])


def find_law(family: Family, replicates: int) -> Law:
    """Fit the law of a family, with a number of bootstrap replicates.

    Raises:
        UserError: There are too few sizes.
    """
    factors, combined = factors_of(family.points)
    _check_sizes(family, factors)
    fitter = _Fitter(family, factors, replicates)
    # Every term is judged beside the others. So all begin as straight lines and change once, one at a time,
    # first the one with which the law predicts best.
    forms: Forms = (_LINE,) * len(factors)
    changes: list[Forms] = [forms]
    while changes:
        forms = min(changes, key=fitter.error)
        terms = [fitter.judge(forms, k, name) for k, name in enumerate(factors)]
        changes = [_with(forms, k, t.form) for k, t in enumerate(terms) if forms[k] == "line" != t.form]
    terms = [replace(term, form=form) for term, form in zip(terms, forms, strict=True)]
    curve, curves = fitter.fit(forms), fitter.replicates(forms)
    x_n = fitter.x_nK[:, 0]
    largest_n = x_n == x_n.max()
    largest = {
        "size": terms[0].values[-1],
        "measured": float(fitter.means_n[largest_n].mean()),
        "predicted": float(fitter.fit(forms, ~largest_n)(fitter.u_nK[largest_n]).mean()),
    }
    crossings = []
    for baseline, loss in fitter.baselines if terms[0].factor in ("experts", "pool parameters") else ():
        losses_B = fitter.draw(np.array([loss]), np.array([len(baseline.runs)]))[0]
        compared = [n for n, b in enumerate(family.baselines) if b is baseline]
        for others in sorted({tuple(fitter.x_nK[n, 1:].tolist()) for n in compared}):
            at = {term.factor: x for term, x in zip(terms[1:], others, strict=True)}
            smallest = _smallest(terms, [curve, *curves], np.append(loss, losses_B), at)
            crossings.append(Crossing(baseline.name, at, loss, smallest))
    return Law(family, tuple(terms), fitter.x_nK, curve, curves, fitter.noise, largest, combined, tuple(crossings))


def _noise(off: float, off_freedom: int, squares: float, freedom: int) -> dict[str, float]:
    """Pool the points' distance from the law with the runs' from their points; the former alone if they disagree."""
    if freedom and squares and stats.f.sf(off / off_freedom / (squares / freedom), off_freedom, freedom) >= _MISFIT_P:
        off, off_freedom = off + squares, off_freedom + freedom
    return {"sd": math.sqrt(off / off_freedom), "freedom": off_freedom}


def _smallest(terms: Sequence[Term], curves: Sequence[Curve], losses: Floats, at: dict[str, float]) -> Estimate | None:
    """Return the pool with which the first curve reaches its loss, with the interval of the others."""
    if terms[0].form == "none":
        return None
    sizes = np.geomspace(terms[0].values[0], FARTHEST * terms[0].values[-1], _STEPS)
    u = log_sizes(terms, sizes, at)
    reached = np.array([curve(u) for curve in curves]) <= losses[:, None]
    first = np.where(reached.any(axis=1), sizes[reached.argmax(axis=1)], math.inf)
    return Estimate(float(first[0]), *interval(first[1:].tolist()))


def _check_sizes(family: Family, factors: dict[str, Floats]) -> None:
    levels = {name: np.unique(x) for name, x in factors.items()}
    sizes, needed = len(set(zip(*factors.values(), strict=True))), max(4, 2 * len(factors) + 2)
    if sizes < needed or any(len(values) < _LEVELS for values in levels.values()):
        varied = "; ".join(f"{name} {', '.join(map(count, values))}" for name, values in levels.items())
        raise UserError(
            f"{family.name}: {plural(len(family.points), 'point')} with finished runs, "
            f"{f'{sizes} sizes ({varied})' if varied else 'all of one size'}; a law needs at least {needed} sizes, and "
            f"{_LEVELS} values of everything that varies"
        )


def _supported(doubling: Estimate, exponent: Estimate, errors: dict[Form, float]) -> Form:
    if doubling.low <= 0 <= doubling.high or errors["none"] <= min(errors["line"], errors["power"]):
        return "none"
    if exponent.low <= 0 or math.isinf(exponent.high):  # at most it is known that the loss levels off, not how
        return "line"
    return "power" if errors["power"] < _CLEARLY * errors["line"] else "line"
