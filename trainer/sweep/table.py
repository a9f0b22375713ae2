"""A sweep's rows in a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.planning.model_costs import count_parameters
from trainer.sweep.result import Row
from trainer.sweep.spec import Experiment
from trainer.sweep.statistics import CONFIDENCE

_WIDTH = 250
"""Columns that a table may have that goes to a file."""
_LEGEND_WIDTH = 110
_COLUMNS = (
    *("total", "active", "seeds", "val loss", "sd", "- baseline", f"{CONFIDENCE:.0%} interval", "p"),
    *("train loss", "max/mean", "dead", "distinct", "differ", "random", "tokens/s"),
)
_ABSENT = "-"


def print_table(experiment: Experiment, rows: Sequence[Row]) -> None:
    """Print it to stdout, with what the columns are."""
    axes = experiment.sweep.axis_keys
    table = Table(box=SIMPLE, pad_edge=False, title=f"{experiment.name}: {experiment.folder}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in (*axes, *_COLUMNS):
        table.add_column(name, justify="right")
    for row in rows:
        point = [str(row.cell.point.get(key, "")) for key in axes]
        cells = [row.cell.variant, *point, *_cells(row)]
        # Text, so that rich takes no brackets for markup
        table.add_row(*map(Text, cells), style="bold" if row.cell.variant == experiment.sweep.baseline else "")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(table)
    legend = textwrap.fill(_legend(experiment, rows), _LEGEND_WIDTH)
    console.print(legend, style="dim", highlight=False, markup=False)


def _cells(row: Row) -> list[str]:
    parameters = count_parameters(row.cell.recipe)
    loss, d, m = row.val_loss, row.difference, row.measures
    compared = [_ABSENT] * 3
    if d:
        interval = _ABSENT if math.isnan(d.low) else f"{d.low:+.4f} {d.high:+.4f}"
        compared = [_number(d.mean, "+.4f"), interval, _p(d.p)]
    return [
        _millions(parameters.total),
        _millions(parameters.active),
        f"{loss.n}/{len(row.cell.runs)}",
        f"{loss.mean:.4f}" if loss.n else _ABSENT,
        _number(loss.sd, ".4f"),
        *compared,
        _number(m["train_loss"], ".4f"),
        _number(m["load_imbalance"], ".2f"),
        _number(m["dead_experts"], ".1f"),
        _number(m["distinct_experts"], ".2f"),
        _number(m["specialisation"], ".2f"),
        _number(m["random_routing"], "+.4f"),
        _number(m["tokens_per_second"], ",.0f"),
    ]


def _legend(experiment: Experiment, rows: Sequence[Row]) -> str:
    tests = sum(1 for row in rows if row.difference and not math.isnan(row.difference.p))
    first = "Parameters, in all and on a token's way; mean and standard deviation over seeds, nats a token"
    last = (
        "training loss, max/mean load, dead experts, distinct ones a token and how the layers' loads differ (bits) are "
        "means over a run's last steps; random is what random experts in one layer add to the loss (probe.every)"
    )
    if tests == 0:
        return f"{first}; {last}."
    several = f", not corrected for {tests} comparisons" if tests > 1 else ""
    return (
        f"{first}; the difference to {experiment.sweep.baseline} is paired by seed, p is of the two-sided paired "
        f"t-test{several}; {last}."
    )


def _number(value: float, form: str) -> str:
    return _ABSENT if math.isnan(value) else format(value, form)


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else _number(value, ".4f")


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M"
