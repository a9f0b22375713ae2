"""A law in words: a table, what it says and how far it may be trusted, JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.common.strict_json import json_safe
from trainer.scaling_law.law import MISFIT_P
from trainer.scaling_law.result import FARTHEST, Crossing, Estimate, Law, Term
from trainer.sweep.statistics import CONFIDENCE

FORMS = {"none": "no dependence", "line": "straight line in the logarithm", "power": "power law"}
_ABSENT = "-"
_WIDTH = 180
"""Columns that a table may have that goes to a file."""
_PERCENT = f"{CONFIDENCE:.0%}"


def print_law(law: Law) -> None:
    """Print table and notes to stdout."""
    table = Table(box=SIMPLE, pad_edge=False, title=law.family.name, title_justify="left")
    table.add_column("factor", no_wrap=True)
    for name in ("range", "bears out", "loss a doubling", f"{_PERCENT} interval", "exponent", f"{_PERCENT} interval"):
        table.add_column(name, justify="right")
    for form in ("none", "line", "power"):
        table.add_column(f"left out: {form}", justify="right")
    for term in law.terms:
        d, a = term.doubling, term.exponent
        cells = [
            term.factor,
            _range(term),
            FORMS[term.form].partition(" in ")[0],
            *(f"{d.value:+.4f}", f"{d.low:+.4f} {d.high:+.4f}"),
            *(f"{a.value:.2f}", f"{_end(a.low)} {_end(a.high)}"),
            *(f"{term.left_out[form]:.4f}" for form in ("none", "line", "power")),
        ]
        table.add_row(*map(Text, cells))  # Text, so that rich takes no brackets for markup
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_WIDTH, highlight=False)
    console.print(table)
    for line in notes(law):
        console.print(Text(f"- {line}"))


def notes(law: Law) -> Iterator[str]:
    """What the law says, one thing a line."""
    yield f"law: {formula(law)}"
    if law.floor:
        yield f"E, for unbounded sizes: {law.floor.value:.3f} ({_end(law.floor.low)} to {_end(law.floor.high)})"
    for term in law.terms:
        yield _verdict(term)
    size, measured, predicted = law.largest
    error = predicted - measured
    yield (
        f"left out, the largest {law.terms[0].factor} ({count(size)}) is predicted as {predicted:.4f}, is "
        f"{measured:.4f}: {error:+.4f}"
    )
    for group in law.groups:
        if group.crossing:
            yield _crossing(group.crossing, law.terms[0])
    fewest, most = law.seeds
    seeds = f"{fewest} to {most}" if fewest < most else f"{most}"
    tokens, freedom = law.family.points[0].tokens, law.noise.freedom
    yield (
        f"rests on {len(law.family.points)} points of {seeds} seed{'s' * (most > 1)}, all of {tokens:,} tokens; a run "
        f"lies {law.noise.sd:.4f} nats about the law, known with {freedom} degree{'s' * (freedom > 1)} of freedom"
    )
    if most == 1:
        yield "with 1 seed, noise and misfit cannot be told apart: add seeds before relying on the intervals"
    if law.noise.misfit_p < MISFIT_P:
        yield f"the points are farther from the law than runs from each other (F-test, p = {law.noise.misfit_p:.2g})"
    for name, other in law.combined.items():
        yield f"{name} vary with {other} only: the terms here stand for both, and cannot tell them apart"
    for warning in law.family.warnings:
        yield f"{warning}: the law is of these together with the sizes"
    limits = ", ".join(f"{count(FARTHEST * term.values[-1])} {term.factor}" for term in law.terms)
    yield f"holds within the range above, at this many tokens; do not ask it beyond {FARTHEST:g} times that ({limits})"


def formula(law: Law) -> str:
    """The law to compute with."""
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
    d, a, errors = term.doubling, term.exponent, term.left_out
    change = f"{d.value:+.4f} nats a doubling ({d.low:+.4f} to {d.high:+.4f})"
    if term.form == "none":
        return (
            f"{term.factor}: no law. Over {_range(term)} the loss does not clearly depend on it: {change}, and without "
            f"it sizes left out are predicted to {errors['none']:.4f} (else {min(errors['line'], errors['power']):.4f})"
        )
    way = "falls" if d.value < 0 else "RISES"
    if term.form == "line":
        same = "a straight line in the logarithm says as much"
        if a.low <= 0:
            why = f"does not differ from zero: {same}"
        elif math.isinf(a.high):
            why = "has no upper bound: these sizes do not tell how the loss levels off"
        else:
            why = f"is above zero, but predicts hardly better: {same}"
        return (
            f"{term.factor}: the loss {way}, {change}; the exponent, {a.value:.2f} ({_end(a.low)} to {_end(a.high)}), "
            f"{why}, and no limit for large sizes can be told"
        )
    return (
        f"{term.factor}: the loss {way} by a power law of exponent {a.value:.2f} ({_end(a.low)} to {_end(a.high)}), "
        f"which differs from zero; sizes left out are predicted to {errors['power']:.4f} (a straight line in the "
        f"logarithm to {errors['line']:.4f}, a constant to {errors['none']:.4f})"
    )


def _crossing(c: Crossing, term: Term) -> str:
    at = "".join(f", {name} {count(value)}" for name, value in c.at.items())
    measured = f"smallest tried that does: {count(c.measured)}" if c.measured else "none that was tried does"
    head = f"{c.baseline}{at}: loss {c.loss:.4f} is reached by"
    if c.smallest is None:
        return f"{head} no size that a law could name; {measured}"
    s = c.smallest
    return f"{head} {term.factor} {_reach(s.value, term)} ({_reach(s.low, term)} to {_reach(s.high, term)}); {measured}"


def _reach(size: float, term: Term) -> str:
    if size == 0:
        return f"below {count(term.values[0] / FARTHEST)}"
    if math.isinf(size):
        return f"none up to {count(FARTHEST * term.values[-1])}"
    return count(math.ceil(size - 1e-9))


def _range(term: Term) -> str:
    return f"{count(term.values[0])} to {count(term.values[-1])}"


def count(x: float) -> str:
    """A size in few characters."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if x >= unit:
            return f"{x / unit:.3g}{name}"
    return f"{x:g}"


def _end(x: float) -> str:
    return _ABSENT + "inf" if x == -math.inf else "inf" if x == math.inf else f"{x:.2f}"


def to_json(law: Law) -> dict[str, Any]:
    """All of it but the points; what is infinite or NaN as null."""
    fewest, most = law.seeds
    size, measured, predicted = law.largest
    tree = {
        "variants": law.family.name,
        "points": len(law.family.points),
        "seeds": {"fewest": fewest, "most": most},
        "tokens": law.family.points[0].tokens,
        "confidence": CONFIDENCE,
        "formula": formula(law),
        "level": law.curve.level,
        "floor": _json(law.floor),
        "terms": [
            {
                "factor": term.factor,
                "values": term.values,
                "form": term.form,
                "centre": term.centre,
                "slope": slope,
                "fitted_exponent": exponent,
                "doubling": _json(term.doubling),
                "exponent": _json(term.exponent),
                "left_out_rms": term.left_out,
            }
            for term, slope, exponent in zip(law.terms, law.curve.slopes, law.curve.exponents, strict=True)
        ],
        "noise": {"sd": law.noise.sd, "freedom": law.noise.freedom, "misfit_p": law.noise.misfit_p},
        "largest": {"size": size, "measured": measured, "predicted": predicted},
        "baselines": [
            {"name": c.baseline, "at": c.at, "loss": c.loss, "smallest": _json(c.smallest), "measured": c.measured}
            for group in law.groups
            if (c := group.crossing)
        ],
        "combined": law.combined,
        "notes": list(notes(law)),
    }
    return json_safe(tree)  # type: ignore[no-any-return]  # a tree stays one


def _json(e: Estimate | None) -> dict[str, float] | None:
    return {"value": e.value, "low": e.low, "high": e.high} if e else None


def all_json(laws: Sequence[Law], skipped: Sequence[str]) -> dict[str, Any]:
    """Of a command."""
    return {"laws": [to_json(law) for law in laws], "not_fitted": list(skipped)}
