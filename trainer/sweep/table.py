"""The result of a sweep as a table in a terminal."""

from __future__ import annotations

import math

from trainer.common.format import ABSENT, count, interval, loss, loss_change, number, p_value
from trainer.common.tables import new_table, print_tables
from trainer.sweep.result import SweepResult, VariantResult
from trainer.sweep.spec import axis_keys
from trainer.sweep.statistics import CONFIDENCE

_COLUMNS = (
    *("total", "active", "seeds", "val loss", "sd", "difference", f"{CONFIDENCE:.0%} interval", "p", "reaches"),
    *("train loss", "max/mean", "dead", "distinct", "differ", "random", "tokens/s"),
)

BEST = " *"
"""Marks the best point of a variant."""


def print_result(result: SweepResult) -> None:
    """Print the table and what its columns mean to stdout."""
    keys = axis_keys(result.axes)
    table = new_table(f"{result.sweep}: {result.folder}", "variant", *keys, *_COLUMNS)
    for variant in result.variants:
        style = "bold" if variant.variant == result.baseline else ""
        point = (str(variant.point.get(key, "")) for key in keys)
        best = BEST if variant is _best(result, variant.variant) else ""
        table.add_row(variant.variant + best, *point, *_cells(variant), style=style)
    print_tables(table, notes=_notes(result))


def _best(result: SweepResult, variant: str) -> VariantResult | None:
    """Return the point of the axes at which a variant has its lowest loss; None if it has one point only."""
    points = [v for v in result.variants if v.variant == variant]
    done = [v for v in points if v.runs]
    return min(done, key=lambda v: v.val_loss.mean) if done and len(points) > 1 else None


def _reached(v: VariantResult) -> str:
    r = v.tokens_to_baseline
    if r is None or v.difference is None or not v.difference.n:
        return ""
    some = f" ({r.n}/{v.difference.n})" if r.n < v.difference.n else ""
    return (count(r.mean, digits=3) if r.n else ABSENT) + some


def _cells(v: VariantResult) -> list[str]:
    d = v.difference
    compared = (loss_change(d.mean), interval(d.low, d.high), p_value(d.p)) if d else ("", "", "")
    return [
        count(v.parameters["total"]),
        count(v.parameters["active"]),
        f"{v.val_loss.n}/{v.planned_runs}",
        loss(v.val_loss.mean),
        loss(v.val_loss.sd),
        *compared,
        _reached(v),
        loss(v.train_loss),
        number(v.load_imbalance, ".2f"),
        number(v.dead_experts, ".1f"),
        number(v.distinct_experts, ".2f"),
        number(v.specialisation, ".2f"),
        loss_change(v.random_routing),
        number(v.tokens_per_second, ",.0f"),
    ]


def _notes(result: SweepResult) -> list[str]:
    tests = sum(1 for v in result.variants if v.difference and not math.isnan(v.difference.p))
    corrected = f", not corrected for {tests} comparisons" if tests > 1 else ""
    tuned = any(_best(result, v.variant) for v in result.variants)
    return [
        "total, active: parameters of the model, and those that a token uses.",
        "val loss, sd: mean and standard deviation over the finished seeds, nats per token.",
        f"difference: to {result.baseline}, paired by seed; p is that of the two-sided paired t-test{corrected}.",
        f"reaches: tokens after which the loss is first as low as the last one of {result.baseline}, same seed; the "
        "learning rate is not at its end there.",
        *([f"{BEST.strip()} the point of the axes at which a variant has its lowest loss."] if tuned else []),
        "max/mean load, dead experts, distinct experts per token, and how much the layers' loads differ (bits) are "
        "means over the last steps of a run.",
        "random: nats that random experts in one layer add to the loss (needs probe.every).",
    ]
