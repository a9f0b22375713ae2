"""The law of a family: which terms its data support, how uncertain they are, and how far they may be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_FORMS: tuple[Form, ...] = ("none", _LINE, "power")
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
    """Find the factors that vary.

    Returns:
        Values by factor, in the order of the points; and the factors that vary only with others, by those.
    """
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


def find_law(family: Family, replicates: int) -> Law:
    """Fit the law of a family.

    Args:
        family: Points of one method.
        replicates: Number of bootstrap replicates.

    Raises:
        UserError: There are too few sizes.
    """
    factors, combined = factors_of(family.points)
    _check_sizes(family, factors)
    x_nK = np.column_stack(list(factors.values()))
    centres = np.exp(np.mean(np.log(np.unique(x_nK, axis=0)), axis=0))
    u_nK = np.log(x_nK / centres)
    runs_n = np.array([len(p.runs) for p in family.points], dtype=float)
    others = [
        b for b in family.baselines.values() if b.name not in {p.name for p in family.points if p.block == b.block}
    ]
    matched = match_seeds([p.losses for p in (*family.points, *others)])
    means_n = matched.means[: len(u_nK)]
    baselines = {b.block: float(mean) for b, mean in zip(others, matched.means[len(u_nK) :], strict=True)}

    def fit_means(forms: Sequence[Form], chosen: Floats | slice = slice(None)) -> Curve:
        return fit(u_nK[chosen], means_n[chosen, None], runs_n[chosen], forms)[0]

    power = fit_means(["power"] * len(factors))
    noise = noise_of(means_n - power(u_nK), runs_n, 1 + 2 * len(factors), matched)
    random = np.random.default_rng(0)
    sd_B = noise.sd * np.sqrt(noise.freedom / random.chisquare(noise.freedom, replicates))

    def draw(losses_n: Floats, runs_n: Floats) -> Floats:
        """Draw means as they might have come out, (n, replicates)."""
        return losses_n[:, None] + sd_B * random.standard_normal((len(losses_n), replicates)) / np.sqrt(runs_n)[:, None]

    lines = fit(u_nK, draw(power(u_nK), runs_n), runs_n, ["line"] * len(factors))
    line = fit_means(["line"] * len(factors))

    @cache
    def error(forms: tuple[Form, ...]) -> float:
        return float(np.sqrt(np.mean(left_out(u_nK, means_n, runs_n, forms) ** 2)))

    @cache
    def fitted(forms: tuple[Form, ...]) -> tuple[Curve, list[Curve]]:
        """Fit a law of these forms, and its replicates."""
        curve = fit_means(forms)
        return curve, fit(u_nK, draw(curve(u_nK), runs_n), runs_n, forms)

    def judge(forms: tuple[Form, ...], k: int, name: str) -> Term:
        """Judge the k-th term, with the others as they are in `forms`."""
        errors = {form: error(_with(forms, k, form)) for form in _FORMS}
        curve, curves = fitted(_with(forms, k, "power"))
        doubling = _estimate(-math.log(2) * line.slopes[k], [-math.log(2) * c.slopes[k] for c in lines])
        exponent = _bounded(_estimate(curve.exponents[k], [c.exponents[k] for c in curves]))
        own = fit_means(forms)
        return Term(
            name,
            tuple(np.unique(factors[name]).tolist()),
            _supported(doubling, exponent, errors),
            float(centres[k]),
            own.slopes[k],
            own.exponents[k],
            doubling,
            exponent,
            errors,
        )

    # Every term is judged beside the others. So all begin as straight lines and change one at a time, each for good,
    # first the one with which the law predicts best.
    forms: tuple[Form, ...] = tuple(_LINE for _ in factors)
    while True:
        terms = [judge(forms, k, name) for k, name in enumerate(factors)]
        changes = [_with(forms, k, t.form) for k, t in enumerate(terms) if forms[k] == _LINE != t.form]
        if not changes:
            break
        forms = min(changes, key=error)
    terms = [Term(**vars(term) | {"form": form}) for term, form in zip(terms, forms, strict=True)]
    curve, curves = fitted(forms)
    shifts_B = matched.level_se * random.standard_t(max(matched.seeds - 1, 1), replicates)
    floors = [c.floor + shift for c, shift in zip(curves, shifts_B.tolist(), strict=True)]
    largest_n = x_nK[:, 0] == x_nK[:, 0].max()
    largest = {
        "size": float(x_nK[:, 0].max()),
        "measured": float(means_n[largest_n].mean()),
        "predicted": float(fit_means(forms, ~largest_n)(u_nK[largest_n]).mean()),
    }

    def crossing(block: str, at: dict[str, float], sizes: Sequence[float], points: Sequence[Point]) -> Crossing:
        baseline, loss, smallest = family.baselines[block], baselines[block], None
        if terms[0].form != "none":
            u = [0.0, *(math.log(value / term.centre) for value, term in zip(at.values(), terms[1:], strict=True))]
            redrawn_B = draw(np.array([loss]), np.array([float(len(baseline.runs))]))[0]
            reached = [c.reach(b, 0, u) for c, b in zip(curves, redrawn_B.tolist(), strict=True)]
            smallest = Estimate(*(_size(end, terms[0]) for end in (curve.reach(loss, 0, u), *interval(reached))))
        enough = [x for x, p in zip(sizes, points, strict=True) if p.val_loss.mean <= baseline.val_loss.mean]
        return Crossing(baseline.name, at, loss, smallest, min(enough, default=None))

    def groups() -> Iterator[Group]:
        members: dict[tuple[tuple[float, ...], str], list[tuple[float, Point]]] = {}
        for p, (x, *others) in zip(family.points, x_nK.tolist(), strict=True):
            block = p.block if p.block in baselines and "layers" != terms[0].factor != "active parameters" else ""
            members.setdefault((tuple(others), block), []).append((x, p))
        for (others, block), own in sorted(members.items(), key=lambda item: item[0]):
            sizes, points = zip(*sorted(own, key=lambda pair: pair[0]), strict=True)
            at = {term.factor: value for term, value in zip(terms[1:], others, strict=True)}
            yield Group(at, sizes, points, crossing(block, at, sizes, points) if block else None)

    return Law(
        family,
        tuple(terms),
        curve,
        curves,
        _estimate(curve.floor, floors) if set(forms) == {"power"} else None,
        noise,
        largest,
        combined,
        tuple(groups()),
    )


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


def _estimate(value: float, replicates: Sequence[float]) -> Estimate:
    return Estimate(value, *interval(replicates))


def _bounded(e: Estimate) -> Estimate:
    """Mark an exponent at the end of the range where it is sought as without a bound on that side."""
    low, high = EXPONENTS
    return Estimate(e.value, -math.inf if e.low < low + 0.01 else e.low, math.inf if e.high > high - 0.01 else e.high)


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
