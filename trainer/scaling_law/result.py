"""The law of a family: which terms its data support, how uncertain they are, and how far they may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from trainer.common.errors import UserError
from trainer.common.format import count, plural
from trainer.scaling_law.law import (
    EXPONENTS,
    Curve,
    Floats,
    Form,
    Noise,
    fit,
    interval,
    left_out,
    match_seeds,
    noise_of,
)
from trainer.scaling_law.points import Family, Point

REPLICATES = 1000
FARTHEST = 2.0
"""Largest size that a law may be asked about, as a multiple of the largest measured one."""

_LINE: Form = "line"
_POWER: Form = "power"
_FORMS: tuple[Form, ...] = ("none", _LINE, _POWER)
_CLEARLY = 0.9
"""A power law, which has one parameter more, must predict sizes left out with this share of a straight line's error."""
_LEVELS = 3
"""Values that a factor must have, since a term has an exponent and a slope besides the common level."""
_ALIKE = 0.9
"""Share of a factor's variance (of its logarithm) explained by others from which on they share one term."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; an end is infinite if the data set no bound."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Term:
    """The term of one factor.

    Attributes:
        factor: `experts`, `pool parameters`, `active parameters` or `layers`.
        values: Its measured values, ascending.
        form: What the data support: no dependence, a straight line in the logarithm, or a power law.
        centre, slope, fitted_exponent: The term in the law, see law.py.
        doubling: Change of loss when the factor doubles, from the straight lines.
        exponent: Exponent of the power law, supported or not, with the other terms in their supported forms.
        left_out_rms: Error on sizes left out, root mean square in nats, by the form of this term.
    """

    factor: str
    values: tuple[float, ...]
    form: Form
    centre: float
    slope: float
    fitted_exponent: float
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
        smallest: The pool by the law, in units of its factor; None if the loss does not depend on the pool.
        measured: The smallest measured pool whose mean is not higher; None if there is none.
    """

    name: str
    at: dict[str, float]
    loss: float
    smallest: Estimate | None
    measured: float | None


@dataclass(frozen=True)
class Group:
    """Points that differ in the first factor only, whose ascending values are `x`; `at` has the other factors."""

    at: dict[str, float]
    x: tuple[float, ...]
    points: tuple[Point, ...]
    crossing: Crossing | None


@dataclass(frozen=True)
class Law:
    """The law of a family.

    Attributes:
        curve: The law, in the forms that the data support.
        replicates: The law as it might have come out with other runs.
        floor: E; None unless all terms are power laws.
        largest: The largest `size` of the first factor, its `measured` loss, and as `predicted` from smaller sizes.
        combined: Factors without a term of their own, since they vary with another, by that other.
        groups: Points that belong to one curve, in ascending order of the other factors.
    """

    family: Family
    terms: tuple[Term, ...]
    curve: Curve
    replicates: Sequence[Curve]
    floor: Estimate | None
    noise: Noise
    largest: dict[str, float]
    combined: dict[str, str]
    groups: tuple[Group, ...]

    @property
    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of a point."""
        counts = [len(point.runs) for point in self.family.points]
        return min(counts), max(counts)

    def u(self, xs: Floats, at: dict[str, float]) -> Floats:
        """Return log(x / centre) for sizes of the first factor and one value of each other factor, (n, K)."""
        columns = [xs, *(np.full(len(xs), value) for value in at.values())]
        return np.log(np.column_stack(columns) / [term.centre for term in self.terms])


def factors_of(points: Sequence[Point]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Return the values of the factors that vary, point by point, and the factors that vary only with others."""
    wide = len({p.expert_parameters for p in points}) > 1
    candidates = {
        "pool parameters" if wide else "experts": [p.experts * (p.expert_parameters if wide else 1) for p in points],
        "active parameters": [p.parameters["active"] for p in points],
        "layers": [p.layers for p in points],
    }
    factors: dict[str, Floats] = {}
    combined: dict[str, str] = {}
    for name, values in candidates.items():
        if len(set(values)) < 2:
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
        x_nK, u_nK: Values of the factors, and log(x / centre).
        means_n: Mean losses, as if every point had all seeds; those of the baselines by block are in `baselines`.
        noise: Distance of runs from a law of power laws.
    """

    def __init__(self, family: Family, factors: dict[str, Floats], replicates: int) -> None:
        self.x_nK = np.column_stack(list(factors.values()))
        self.centres = np.exp(np.mean(np.log(np.unique(self.x_nK, axis=0)), axis=0))
        self.u_nK = np.log(self.x_nK / self.centres)
        self._runs_n = np.array([len(p.runs) for p in family.points], dtype=float)
        others = [b for b in family.baselines.values() if not any(b is p for p in family.points)]
        matched = match_seeds([p.losses for p in (*family.points, *others)])
        self.means_n = matched.means[: len(family.points)]
        means = matched.means[len(family.points) :].tolist()
        self.baselines = {b.block: mean for b, mean in zip(others, means, strict=True)}
        power = self.fit((_POWER,) * len(factors))
        residuals_n = self.means_n - power(self.u_nK)
        self.noise = noise_of(residuals_n, self._runs_n, 1 + 2 * len(factors), matched)
        self._random = np.random.default_rng(0)
        freedom = self.noise.freedom
        self._sd_B = self.noise.sd * np.sqrt(freedom / self._random.chisquare(freedom, replicates))
        self.line = self.fit((_LINE,) * len(factors))
        self.lines = self._redraw(power, (_LINE,) * len(factors))
        self._matched = matched
        self.error, self.replicates = cache(self._error), cache(lambda forms: self._redraw(self.fit(forms), forms))

    def fit(self, forms: tuple[Form, ...], chosen: Floats | slice = slice(None)) -> Curve:
        """Fit a law of these forms to all points, or to the chosen ones."""
        return fit(self.u_nK[chosen], self.means_n[chosen, None], self._runs_n[chosen], forms)[0]

    def draw(self, losses_n: Floats, runs_n: Floats) -> Floats:
        """Draw means as they might have come out, (n, replicates)."""
        normal_nB = self._random.standard_normal((len(losses_n), len(self._sd_B)))
        return np.asarray(losses_n[:, None] + self._sd_B * normal_nB / np.sqrt(runs_n)[:, None])

    def draw_shifts(self) -> list[float]:
        """Draw what other seeds might have added to all points alike."""
        freedom = max(self._matched.seeds - 1, 1)
        shifts_B = self._matched.level_se * self._random.standard_t(freedom, len(self._sd_B))
        return [float(shift) for shift in shifts_B]

    def _redraw(self, curve: Curve, forms: tuple[Form, ...]) -> list[Curve]:
        """Fit laws of these forms to means drawn about a curve."""
        return fit(self.u_nK, self.draw(curve(self.u_nK), self._runs_n), self._runs_n, forms)

    def _error(self, forms: tuple[Form, ...]) -> float:
        """Return the root mean square error on sizes left out."""
        return float(np.sqrt(np.mean(left_out(self.u_nK, self.means_n, self._runs_n, forms) ** 2)))

    def judge(self, forms: tuple[Form, ...], k: int, name: str) -> Term:
        """Judge the term of the k-th factor, with the others as they are in `forms`."""
        errors = {form: self.error(_with(forms, k, form)) for form in _FORMS}
        as_power = _with(forms, k, _POWER)
        slopes = [-math.log(2) * curve.slopes[k] for curve in (self.line, *self.lines)]
        doubling = Estimate(slopes[0], *interval(slopes[1:]))
        low, high = interval([curve.exponents[k] for curve in self.replicates(as_power)])
        # At the end of the range in which it is sought, an exponent has no bound on that side.
        low = -math.inf if low < EXPONENTS[0] + 0.01 else low
        high = math.inf if high > EXPONENTS[1] - 0.01 else high
        exponent = Estimate(self.fit(as_power).exponents[k], low, high)
        return Term(
            name,
            tuple(np.unique(self.x_nK[:, k]).tolist()),
            _supported(doubling, exponent, errors),
            float(self.centres[k]),
            self.fit(forms).slopes[k],
            self.fit(forms).exponents[k],
            doubling,
            exponent,
            errors,
        )


def find_law(family: Family, replicates: int) -> Law:
    """Fit the law of a family, with a number of bootstrap replicates.

    Raises:
        UserError: There are too few sizes.
    """
    factors, combined = factors_of(family.points)
    _check_sizes(family, factors)
    fitter = _Fitter(family, factors, replicates)
    # Every term is judged beside the others. So all begin as straight lines and change one at a time, each for good,
    # first the one with which the law predicts best.
    forms: tuple[Form, ...] = (_LINE,) * len(factors)
    while True:
        terms = [fitter.judge(forms, k, name) for k, name in enumerate(factors)]
        changes = [_with(forms, k, t.form) for k, t in enumerate(terms) if forms[k] == _LINE != t.form]
        if not changes:
            break
        forms = min(changes, key=fitter.error)
    terms = [replace(term, form=form) for term, form in zip(terms, forms, strict=True)]
    curve, curves = fitter.fit(forms), fitter.replicates(forms)
    floors = [c.floor + shift for c, shift in zip(curves, fitter.draw_shifts(), strict=True)]
    largest_n = fitter.x_nK[:, 0] == fitter.x_nK[:, 0].max()
    largest = {
        "size": float(fitter.x_nK[:, 0].max()),
        "measured": float(fitter.means_n[largest_n].mean()),
        "predicted": float(fitter.fit(forms, ~largest_n)(fitter.u_nK[largest_n]).mean()),
    }
    floor = Estimate(curve.floor, *interval(floors)) if set(forms) == {_POWER} else None
    law = Law(family, tuple(terms), curve, curves, floor, fitter.noise, largest, combined, ())
    return replace(law, groups=tuple(_groups(law, fitter)))


def _groups(law: Law, fitter: _Fitter) -> Iterator[Group]:
    members: dict[tuple[tuple[float, ...], str], list[tuple[float, Point]]] = {}
    of_pool = law.terms[0].factor in ("experts", "pool parameters")
    for p, (x, *others) in zip(law.family.points, fitter.x_nK.tolist(), strict=True):
        block = p.block if of_pool and p.block in fitter.baselines else ""
        members.setdefault((tuple(others), block), []).append((x, p))
    for (others, block), own in sorted(members.items(), key=lambda item: item[0]):
        sizes, points = zip(*sorted(own, key=lambda pair: pair[0]), strict=True)
        group = Group({t.factor: x for t, x in zip(law.terms[1:], others, strict=True)}, sizes, points, None)
        yield replace(group, crossing=_crossing(law, fitter, group, block)) if block else group


def _crossing(law: Law, fitter: _Fitter, group: Group, block: str) -> Crossing:
    baseline, loss, first = law.family.baselines[block], fitter.baselines[block], law.terms[0]
    smallest = None
    if first.form != "none":
        (u,) = law.u(np.array([first.centre]), group.at).tolist()
        redrawn_B = fitter.draw(np.array([loss]), np.array([float(len(baseline.runs))]))[0].tolist()
        reached = [curve.reach(drawn, 0, u) for curve, drawn in zip(law.replicates, redrawn_B, strict=True)]
        smallest = Estimate(*(_size(end, first) for end in (law.curve.reach(loss, 0, u), *interval(reached))))
    enough = [x for x, p in zip(group.x, group.points, strict=True) if p.val_loss.mean <= baseline.val_loss.mean]
    return Crossing(baseline.name, group.at, loss, smallest, min(enough, default=None))


def _with(forms: tuple[Form, ...], k: int, form: Form) -> tuple[Form, ...]:
    return (*forms[:k], form, *forms[k + 1 :])


def _check_sizes(family: Family, factors: dict[str, Floats]) -> None:
    named = f"{family.name}: {plural(len(family.points), 'point')} with finished runs"
    if not factors:
        raise UserError(f"{named}, all of one size; a law needs at least 4 pool sizes")
    for name, x in factors.items():
        if len(values := np.unique(x)) < _LEVELS:
            listed = " and ".join(map(count, values.tolist()))
            raise UserError(
                f"{named}: {name} is {listed}; a law needs at least {_LEVELS} values of everything that varies; add "
                "some, or give only results in which it does not vary"
            )
    sizes, needed = len(set(zip(*factors.values(), strict=True))), 2 * len(factors) + 2
    if sizes < needed:
        raise UserError(
            f"{named}: {sizes} sizes ({', '.join(factors)}); a law of {2 * len(factors) + 1} parameters needs at "
            f"least {needed}: {needed - sizes} missing"
        )


def _supported(doubling: Estimate, exponent: Estimate, errors: dict[Form, float]) -> Form:
    if doubling.low <= 0 <= doubling.high or errors["none"] <= min(errors["line"], errors["power"]):
        return "none"
    if exponent.low <= 0 or math.isinf(exponent.high):  # at most it is known that the loss levels off, not how
        return "line"
    return "power" if errors["power"] < _CLEARLY * errors["line"] else "line"


def _size(u: float, term: Term) -> float:
    """Convert u to a size; 0 or infinite beyond what the law may be asked about."""
    low, high = term.values[0] / FARTHEST, FARTHEST * term.values[-1]
    x = term.centre * math.exp(min(u, 700.0))
    return 0.0 if x < low else math.inf if x > high else x
