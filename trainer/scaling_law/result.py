"""A family's law: which terms its data bear out, how uncertain they are, and how far they may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from trainer.common.errors import UserError
from trainer.scaling_law.law import (
    EXPONENTS,
    Curve,
    Floats,
    Form,
    Matched,
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
"""Times the largest size that a law may be asked about."""

_LINE: Form = "line"
_FORMS: tuple[Form, ...] = ("none", _LINE, "power")
_CLEARLY = 0.9
"""Of a straight line's error on sizes left out: a power law, which has a parameter more, must come below."""
_LEVELS = 3
"""Values that a factor must have: a term has an exponent and a slope besides the common level."""
_ALIKE = 0.9
"""Share of a factor's variance (of its logarithm) that others explain from which there is one term for all."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; infinite where the data set no bound."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Term:
    """One factor's.

    Attributes:
        factor: experts, pool parameters, active parameters or layers.
        values: those there are, ascending.
        centre: of the factor; see law.py.
        form: what the data bear out: no dependence, a straight line in the logarithm, a power law.
        doubling: change of loss when the factor doubles, of the straight lines.
        exponent: of the power law, whether borne out or not; the other terms have the forms that are.
        left_out: error on sizes left out, root mean square in nats, with this term of each form.
    """

    factor: str
    values: tuple[float, ...]
    centre: float
    form: Form
    doubling: Estimate
    exponent: Estimate
    left_out: dict[Form, float]


@dataclass(frozen=True)
class Crossing:
    """The smallest pool that reaches a baseline's loss.

    Attributes:
        baseline: its name.
        at: the factors besides the pool.
        loss: the baseline's.
        smallest: by the law, in units of the pool's factor; None where the loss does not depend on the pool.
        measured: the smallest pool there is whose mean is no higher; None: none is.
    """

    baseline: str
    at: dict[str, float]
    loss: float
    smallest: Estimate | None
    measured: float | None


@dataclass(frozen=True)
class Group:
    """Points that differ in the first factor only, as matched, with what is drawn of them.

    Attributes:
        at: the other factors.
        x, points: sizes and points, ascending.
        xs, law, low, high: the law and its band, to FARTHEST times the last size.
        crossing: None without a baseline.
    """

    at: dict[str, float]
    x: tuple[float, ...]
    points: tuple[Point, ...]
    xs: Floats
    law: Floats
    low: Floats
    high: Floats
    crossing: Crossing | None


@dataclass(frozen=True)
class Law:
    """What was found.

    Attributes:
        curve: the law, in the forms that the data bear out.
        floor: E; None unless all terms that are there are power laws.
        largest: the largest first factor there is; then mean loss there, and as predicted from all smaller ones.
        combined: factors without a term of their own, since they vary with another: by that other.
    """

    family: Family
    terms: tuple[Term, ...]
    curve: Curve
    floor: Estimate | None
    noise: Noise
    largest: tuple[float, float, float]
    combined: dict[str, str]
    groups: tuple[Group, ...]

    @property
    def seeds(self) -> tuple[int, int]:
        """Fewest and most of a point."""
        counts = [len(point.losses) for point in self.family.points]
        return min(counts), max(counts)


def factors_of(points: Sequence[Point]) -> tuple[dict[str, Floats], dict[str, str]]:
    """The factors that vary, by name, each in the points' order; and those that vary only with another, by that."""
    wide = len({point.expert_parameters for point in points}) > 1
    pool = [point.experts * (point.expert_parameters if wide else 1) for point in points]
    candidates = {
        "pool parameters" if wide else "experts": pool,
        "active parameters": [point.active for point in points],
        "layers": [point.layers for point in points],
    }
    factors: dict[str, Floats] = {}
    combined: dict[str, str] = {}
    for name, values in candidates.items():
        if len(set(values)) < 2:
            continue
        x = np.array(values, dtype=float)
        if factors and (with_ := _explained(x, factors)) is not None:
            combined[name] = with_
        else:
            factors[name] = x
    return factors, combined


def _explained(x: Floats, factors: dict[str, Floats]) -> str | None:
    """The factors that x varies with, in logarithms."""
    log = np.log(x)
    others = np.column_stack([np.ones(len(x)), *map(np.log, factors.values())])
    left = log - others @ np.linalg.lstsq(others, log)[0]
    return " and ".join(factors) if np.var(left) <= (1 - _ALIKE) * np.var(log) else None


def find_law(family: Family, replicates: int) -> Law:
    """Fit a family's law.

    Raises:
        UserError: there are too few sizes; says what is missing.
    """
    factors, combined = factors_of(family.points)
    x_nK = np.column_stack(list(factors.values())) if factors else np.empty((len(family.points), 0))
    _check_sizes(family, factors)
    centres = np.exp(np.mean(np.log(np.unique(x_nK, axis=0)), axis=0))
    u_nK = np.log(x_nK / centres)
    runs_n = np.array([len(point.losses) for point in family.points], dtype=float)

    others = [b for b in family.baselines.values() if not any(b is point for point in family.points)]
    matched = match_seeds([point.losses for point in (*family.points, *others)])
    means_n = matched.means[: len(u_nK)]
    baselines = {b.block: float(mean) for b, mean in zip(others, matched.means[len(u_nK) :], strict=True)}

    (best,) = fit(u_nK, means_n[:, None], runs_n, ["power"] * len(factors))
    noise = noise_of(means_n - best(u_nK), runs_n, 1 + 2 * len(factors), matched.squares, matched.freedom)
    drawn = _Drawn(noise, replicates)
    lines = fit(u_nK, drawn.about(best(u_nK), runs_n), runs_n, ["line"] * len(factors))
    (line,) = fit(u_nK, means_n[:, None], runs_n, ["line"] * len(factors))

    @cache
    def error(forms: tuple[Form, ...]) -> float:
        return float(np.sqrt(np.mean(left_out(u_nK, means_n, runs_n, forms) ** 2)))

    @cache
    def fitted(forms: tuple[Form, ...]) -> tuple[Curve, list[Curve]]:
        """The law of these forms, and its replicates."""
        (curve,) = fit(u_nK, means_n[:, None], runs_n, forms)
        return curve, fit(u_nK, drawn.about(curve(u_nK), runs_n), runs_n, forms)

    def judge(forms: tuple[Form, ...], k: int, name: str) -> Term:
        """The k-th term, beside the others as they are in `forms`."""
        errors = {form: error(_with(forms, k, form)) for form in _FORMS}
        curve, curves = fitted(_with(forms, k, "power"))
        doubling = _estimate(-math.log(2) * line.slopes[k], [-math.log(2) * c.slopes[k] for c in lines])
        exponent = _bounded(_estimate(curve.exponents[k], [c.exponents[k] for c in curves]))
        values = tuple(float(value) for value in np.unique(factors[name]))
        return Term(name, values, float(centres[k]), _form(doubling, exponent, errors), doubling, exponent, errors)

    # A term is judged beside the others. So, from straight lines on, they change one at a time, each for good: the one
    # first that makes the law predict best.
    forms: tuple[Form, ...] = tuple(_LINE for _ in factors)
    while True:
        terms = [judge(forms, k, name) for k, name in enumerate(factors)]
        lines_left = [k for k, form in enumerate(forms) if form == _LINE and terms[k].form != _LINE]
        if not lines_left:
            break
        forms = min((_with(forms, k, terms[k].form) for k in lines_left), key=error)
    terms = [replace(term, form=form) for term, form in zip(terms, forms, strict=True)]
    curve, curves = fitted(forms)
    floors = np.array([c.floor for c in curves]) + drawn.shifts(matched)
    return Law(
        family,
        tuple(terms),
        curve,
        _estimate(curve.floor, floors.tolist()) if set(forms) == {"power"} else None,
        noise,
        _largest(x_nK[:, 0], u_nK, means_n, runs_n, forms),
        combined,
        tuple(_groups(family, terms, x_nK, curve, curves, drawn, baselines)),
    )


def _with(forms: tuple[Form, ...], k: int, form: Form) -> tuple[Form, ...]:
    return (*forms[:k], form, *forms[k + 1 :])


def _check_sizes(family: Family, factors: dict[str, Floats]) -> None:
    named = f"{family.name}: {len(family.points)} point{'s' * (len(family.points) != 1)} with runs that are done"
    if not factors:
        raise UserError(f"{named}, all of one size; a law needs at least 4 pool sizes")
    for name, x in factors.items():
        if len(values := np.unique(x)) < _LEVELS:
            listed = " and ".join(f"{value:g}" for value in values)
            raise UserError(
                f"{named}: {name} {listed}; a law needs at least {_LEVELS} values of what varies; add some, or give "
                "only results in which it does not"
            )
    sizes, needed = len(set(zip(*factors.values(), strict=True))), 2 * len(factors) + 2
    if sizes < needed:
        raise UserError(
            f"{named}: {sizes} sizes ({', '.join(factors)}); a law of {2 * len(factors) + 1} parameters needs at "
            f"least {needed}: {needed - sizes} missing"
        )


class _Drawn:
    """Replicates of the runs' noise."""

    def __init__(self, noise: Noise, replicates: int) -> None:
        self._random = np.random.default_rng(0)
        self._sd_B = noise.sd * np.sqrt(noise.freedom / self._random.chisquare(noise.freedom, replicates))

    def about(self, losses_n: Floats, runs_n: Floats) -> Floats:
        """Means as they might have come out, (n, replicates)."""
        random_nB = self._random.standard_normal((len(losses_n), len(self._sd_B)))
        return np.asarray(losses_n[:, None] + self._sd_B * random_nB / np.sqrt(runs_n)[:, None])

    def shifts(self, matched: Matched) -> Floats:
        """Of all points alike, as other seeds might have made it, (replicates,)."""
        return matched.level_se * self._random.standard_t(max(matched.seeds - 1, 1), len(self._sd_B))


def _estimate(value: float, replicates: Sequence[float]) -> Estimate:
    return Estimate(value, *interval(replicates))


def _bounded(e: Estimate) -> Estimate:
    """An exponent at the end of where it was looked for has no bound on that side."""
    low, high = EXPONENTS
    return Estimate(e.value, -math.inf if e.low < low + 0.01 else e.low, math.inf if e.high > high - 0.01 else e.high)


def _form(doubling: Estimate, exponent: Estimate, errors: dict[Form, float]) -> Form:
    if doubling.low <= 0 <= doubling.high or errors["none"] <= min(errors["line"], errors["power"]):
        return "none"
    if exponent.low <= 0 or math.isinf(exponent.high):  # at most that the loss levels off is told, not how
        return "line"
    return "power" if errors["power"] < _CLEARLY * errors["line"] else "line"


def _largest(
    x_n: Floats, u_nK: Floats, means_n: Floats, runs_n: Floats, forms: Sequence[Form]
) -> tuple[float, float, float]:
    largest_n = x_n == x_n.max()
    (curve,) = fit(u_nK[~largest_n], means_n[~largest_n, None], runs_n[~largest_n], forms)
    return float(x_n.max()), float(means_n[largest_n].mean()), float(curve(u_nK[largest_n]).mean())


def _groups(
    family: Family,
    terms: Sequence[Term],
    x_nK: Floats,
    curve: Curve,
    curves: Sequence[Curve],
    drawn: _Drawn,
    baselines: dict[str, float],
) -> Iterator[Group]:
    """One for each of the other factors' values, and for each baseline.

    Args:
        baselines: their matched means by block.
    """
    first = terms[0]
    places: dict[tuple[str, tuple[float, ...]], list[int]] = {}
    for place, point in enumerate(family.points):
        block = point.block if point.block in baselines else ""
        places.setdefault((block, tuple(x_nK[place, 1:].tolist())), []).append(place)
    for (block, others), own in places.items():
        own.sort(key=lambda place: float(x_nK[place, 0]))
        at = {term.factor: value for term, value in zip(terms[1:], others, strict=True)}
        u = [0.0, *(math.log(value / term.centre) for term, value in zip(terms[1:], others, strict=True))]
        sizes = tuple(float(x_nK[place, 0]) for place in own)
        xs = np.geomspace(sizes[0], FARTHEST * sizes[-1], 120)
        us = np.column_stack([np.log(xs / first.centre), *(np.full(len(xs), value) for value in u[1:])])
        bands = [interval(values) for values in np.array([c(us) for c in curves]).T]
        low, high = (np.array(side) for side in zip(*bands, strict=True))
        points = tuple(family.points[place] for place in own)
        crossing = None
        if block and first.factor in ("experts", "pool parameters"):
            baseline, loss = family.baselines[block], baselines[block]
            redrawn_B = drawn.about(np.array([loss]), np.array([float(len(baseline.losses))]))[0]
            smallest = None
            if first.form != "none":
                reached = [c.reach(b, 0, u) for c, b in zip(curves, redrawn_B.tolist(), strict=True)]
                value = _size(curve.reach(loss, 0, u), first)
                smallest = Estimate(value, *(_size(end, first) for end in interval(reached)))
            enough = [x for x, point in zip(sizes, points, strict=True) if point.mean <= baseline.mean]
            crossing = Crossing(baseline.name, at, loss, smallest, min(enough, default=None))
        yield Group(at, sizes, points, xs, curve(us), low, high, crossing)


def _size(u: float, term: Term) -> float:
    """A size; 0 or infinite where it would be beyond what the law may be asked about."""
    low, high = term.values[0] / FARTHEST, FARTHEST * term.values[-1]
    x = term.centre * math.exp(min(u, 700.0))
    return 0.0 if x < low else math.inf if x > high else x
