"""A law in words: a table, notes on what it says and how far it may be trusted, and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.common.format import count, interval, loss, loss_change, p_value, plural
from trainer.common.strict_json import json_safe
from trainer.common.tables import new_table, print_tables
from trainer.scaling_law.law import MISFIT_P, Form
from trainer.scaling_law.result import FARTHEST, Crossing, Law, Term
from trainer.sweep.statistics import CONFIDENCE

FORMS: dict[Form, str] = {"none": "no dependence", "line": "straight line in the logarithm", "power": "power law"}


def print_law(law: Law) -> None:
    """Print table and notes to stdout."""
    level = f"{CONFIDENCE:.0%} interval"
    errors = (f"left out: {form}" for form in FORMS)
    table = new_table(
        law.family.name, "factor", "range", "supported", "loss per doubling", level, "exponent", level, *errors
    )
    for term in law.terms:
        d, a = term.doubling, term.exponent
        table.add_row(
            *(term.factor, _range(term), FORMS[term.form].partition(" in ")[0]),
            *(loss_change(d.value), interval(d.low, d.high), f"{a.value:.2f}", interval(a.low, a.high, ".2f")),
            *(loss(term.left_out_rms[form]) for form in FORMS),
        )
    print_tables(table, notes=list(notes(law)))


def notes(law: Law) -> Iterator[str]:
    """Say what the law is, one thing per line."""
    yield f"law: {formula(law)}"
    if law.floor:
        ends = interval(law.floor.low, law.floor.high, ".2f")
        yield f"E, the loss for unbounded sizes, is {law.floor.value:.3f} ({ends})"
    for term in law.terms:
        yield _verdict(term)
    first, largest = law.terms[0], law.largest
    error = loss_change(largest["predicted"] - largest["measured"])
    yield (
        f"without the largest size ({_size(largest['size'])} {first.factor}) the law predicts a loss of "
        f"{loss(largest['predicted'])} there; measured is {loss(largest['measured'])}: {error}"
    )
    for group in law.groups:
        if group.crossing:
            yield _crossing(group.crossing, first)
    fewest, most = law.seeds
    seeds = f"{fewest} to {most} seeds" if fewest < most else plural(most, "seed")
    yield (
        f"the law rests on {len(law.family.points)} points of {seeds}, all of {law.family.points[0].tokens:,} tokens; "
        f"runs lie {law.noise.sd:.4f} nats about it, known with {plural(law.noise.freedom, 'degree')} of freedom"
    )
    if most == 1:
        yield "with 1 seed, noise and misfit cannot be told apart: add seeds before relying on the intervals"
    if law.noise.misfit_p < MISFIT_P:
        p = p_value(law.noise.misfit_p)
        yield f"the points are farther from the law than runs are from each other (F-test, p = {p})"
    for name, other in law.combined.items():
        yield f"{name} vary only together with {other}: the terms stand for both and cannot tell them apart"
    for warning in law.family.warnings:
        yield f"{warning}: the law describes this together with the sizes"
    limits = ", ".join(f"{_size(FARTHEST * term.values[-1])} {term.factor}" for term in law.terms)
    yield f"the law holds in the ranges above; do not use it beyond {FARTHEST:g} times that ({limits})"


def formula(law: Law) -> str:
    """Write the law as a formula to compute with."""
    parts = []
    level = law.curve.level
    for term, slope, a in zip(law.terms, law.curve.slopes, law.curve.exponents, strict=True):
        name = term.factor.replace(" ", "_")
        if term.form == "line":
            level += slope * math.log(term.centre)
            parts.append(f"{-slope:+.4g} ln({name})")
        elif term.form == "power" and a != 0:
            level -= slope / a
            parts.append(f"{slope / a * term.centre**a:+.4g} {name}^{-a:.3f}")
    return " ".join([f"loss = {level:.4f}", *parts])


def _verdict(term: Term) -> str:
    """Say why a term has its form; the numbers are in the table."""
    if term.form == "none":
        return f"{term.factor}: no law; from {_range(term)} the loss does not clearly depend on it"
    way = "falls" if term.doubling.value < 0 else "RISES"
    if term.form == "power":
        return f"{term.factor}: the loss {way} by a power law, whose exponent differs from zero"
    if term.exponent.low <= 0:
        why = "the exponent of a power law does not differ from zero"
    elif math.isinf(term.exponent.high):
        why = "these sizes do not show how the loss levels off"
    else:
        why = "a power law hardly predicts sizes left out better"
    return f"{term.factor}: the loss {way} by a straight line in the logarithm; {why}, so its limit is not known"


def _crossing(c: Crossing, term: Term) -> str:
    at = "".join(f", {_size(value)} {name}" for name, value in c.at.items())
    measured = (
        f"the smallest measured pool that does has {_size(c.measured)}" if c.measured else "no measured pool does"
    )
    head = f"{c.name}{at}: its loss of {loss(c.loss)} is reached by"
    if c.smallest is None:
        return f"{head} no size that a law could name; {measured}"
    value, low, high = (_reach(end, term) for end in (c.smallest.value, c.smallest.low, c.smallest.high))
    return f"{head} {value} {term.factor} ({low} to {high}); {measured}"


def _reach(size: float, term: Term) -> str:
    if size == 0:
        return f"fewer than {_size(term.values[0] / FARTHEST)}"
    if math.isinf(size):
        return f"more than {_size(FARTHEST * term.values[-1])}"
    return _size(math.ceil(size - 1e-9))


def _range(term: Term) -> str:
    return f"{_size(term.values[0])} to {_size(term.values[-1])}"


def _size(value: float) -> str:
    return count(value, digits=3)


def to_json(law: Law) -> dict[str, Any]:
    """Return everything but the points; infinite numbers and NaN become null."""
    fewest, most = law.seeds
    tree: dict[str, Any] = {
        "variants": law.family.name,
        "points": len(law.family.points),
        "seeds": {"fewest": fewest, "most": most},
        "tokens": law.family.points[0].tokens,
        "confidence": CONFIDENCE,
        "formula": formula(law),
        "level": law.curve.level,
        "floor": asdict(law.floor) if law.floor else None,
        "terms": [asdict(term) for term in law.terms],
        "noise": asdict(law.noise),
        "largest": law.largest,
        "baselines": [asdict(group.crossing) for group in law.groups if group.crossing],
        "combined": law.combined,
        "notes": list(notes(law)),
    }
    return json_safe(tree)  # type: ignore[no-any-return]  # a dict stays one
