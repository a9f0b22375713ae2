"""A law in words: a table, notes on what it says and how far it may be trusted, and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainer.common.format import count, interval, loss, loss_change, plural
from trainer.common.tables import new_table, print_tables
from trainer.scaling_law.law import FORMS
from trainer.scaling_law.result import FARTHEST, Law, Term
from trainer.sweep.statistics import CONFIDENCE


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
            *(term.factor, f"{_size(term.values[0])} to {_size(term.values[-1])}", FORMS[term.form]),
            *(loss_change(d.value), interval(d.low, d.high), f"{a.value:.2f}", interval(a.low, a.high, ".2f")),
            *(loss(term.left_out_rms[form]) for form in FORMS),
        )
    print_tables(table, notes=list(notes(law)))


def notes(law: Law) -> Iterator[str]:
    """Say what the law is, one thing per line."""
    yield f"law: {formula(law)}"
    first, largest = law.terms[0], law.largest
    error = loss_change(largest["predicted"] - largest["measured"])
    yield (
        f"without the largest size ({_size(largest['size'])} {first.factor}) the law predicts a loss of "
        f"{loss(largest['predicted'])} there; measured is {loss(largest['measured'])}: {error}"
    )
    for c in law.crossings:
        at = "".join(f", {_size(value)} {name}" for name, value in c.at.items())
        if c.smallest:
            size, low, high = (_reached(end, first) for end in (c.smallest.value, c.smallest.low, c.smallest.high))
            yield f"{c.name}{at}: its loss of {loss(c.loss)} is reached by {size} {first.factor} ({low} to {high})"
        else:
            yield f"{c.name}{at}: no pool size that reaches its loss of {loss(c.loss)} can be given, as there is no law"
    points = law.family.points
    yield (
        f"the law rests on {sum(len(p.runs) for p in points)} runs of {len(points)} points, all of "
        f"{points[0].tokens:,} tokens; runs lie {law.noise['sd']:.4f} nats about it, known with "
        f"{plural(int(law.noise['freedom']), 'degree')} of freedom"
    )
    if all(len(p.runs) == 1 for p in points):
        yield "with 1 seed, noise and misfit cannot be told apart: add seeds before relying on the intervals"
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
    for term, slope, a in zip(law.terms, law.curve.slopes_K, law.curve.exponents_K, strict=True):
        name = term.factor.replace(" ", "_")
        if term.form == "line":
            level += slope * math.log(term.centre)
            parts.append(f"{-slope:+.4g} ln({name})")
        elif term.form == "power" and a != 0:
            level -= slope / a
            parts.append(f"{slope / a * term.centre**a:+.4g} {name}^{-a:.3f}")
    return " ".join([f"loss = {level:.4f}", *parts])


def _reached(size: float, term: Term) -> str:
    if math.isinf(size):
        return f"more than {_size(FARTHEST * term.values[-1])}"
    return _size(math.ceil(size)) if size > term.values[0] else f"at most {_size(size)}"


def _size(value: float) -> str:
    return count(value, digits=3)


def to_json(law: Law) -> dict[str, Any]:
    """Return everything but the points and the replicates."""
    return {
        "variants": law.family.name,
        "points": len(law.family.points),
        "runs": sum(len(p.runs) for p in law.family.points),
        "tokens": law.family.points[0].tokens,
        "confidence": CONFIDENCE,
        "formula": formula(law),
        "terms": list(map(asdict, law.terms)),
        "noise": law.noise,
        "largest": law.largest,
        "baselines": list(map(asdict, law.crossings)),
        "combined": law.combined,
        "notes": list(notes(law)),
    }
