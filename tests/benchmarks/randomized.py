"""How much the routing of a sweep's models is worth, by layer: a table, a picture, and all numbers.

python -m tests.benchmarks.randomized PROBES OUT

PROBES is a folder of results of `unipool probe randomize --layers all --json`, one for each run of a sweep, named
VARIANT-SEED.json. The table is printed; OUT gets `randomized.csv` and `randomized.svg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from matplotlib.axes import Axes

from tests.benchmarks.report import compared, write_csv
from trainer.common.figure_style import SERIES, add_legend, new_figure, panel_title, style_axes, write_svg
from trainer.common.strict_json import loads
from trainer.sweep.statistics import paired, spread

BASELINE = "vanilla"
LABELS = {
    "vanilla": "vanilla (private experts)",
    "unipool": "UniPool",
    "unipool-lock": "UniPool-lock",
    "unipool-lock-random": "UniPool-lock, random allocation",
}
OWN, POOL = "layer", "pool"
"""Experts are drawn from those of the layer, or from the full pool."""


@dataclass(frozen=True)
class Increase:
    """The nats that random experts in one layer of a run add to the loss, over all draws."""

    variant: str
    seed: int
    layer: int
    over: str
    nats: float


def read(folder: Path) -> list[Increase]:
    """Read the results of all runs.

    Raises:
        click.ClickException: There are none.
    """
    found = []
    for file in sorted(folder.glob("*-*.json")):
        variant, seed = file.stem.rsplit("-", 1)
        for one in loads(file.read_text())["layers"]:
            found.append(Increase(variant, int(seed), one["layer"], one["over"], round(one["increase"], 6)))
    if not found:
        raise click.ClickException(f"{folder}: has no results named VARIANT-SEED.json")
    return found


def by_seed(increases: Iterable[Increase], variant: str, over: str, layers: Iterable[int]) -> dict[int, float]:
    """Return the mean over some layers, for each seed of a variant."""
    wanted, nats = set(layers), dict[int, list[float]]()
    for one in increases:
        if (one.variant, one.over) == (variant, over) and one.layer in wanted:
            nats.setdefault(one.seed, []).append(one.nats)
    return {seed: float(np.mean(values)) for seed, values in sorted(nats.items())}


def table(increases: Sequence[Increase]) -> list[str]:
    """Return a table in Markdown: means over all layers and over the deep half, and their differences to vanilla."""
    depth = 1 + max(one.layer for one in increases)
    halves = {"all layers": range(depth), "deep half": range(depth // 2, depth)}
    head = [
        f"{name}, {over}" for name in halves for over in ("the layer's own", "minus vanilla (95 %)", "the full pool")
    ]
    rows = ["| variant | seeds | " + " | ".join(head) + " |", "|" + "---|" * (2 + len(head))]
    for variant in _variants(increases):
        cells = []
        for layers in halves.values():
            own, pool = (by_seed(increases, variant, over, layers) for over in (OWN, POOL))
            found = paired(own, by_seed(increases, BASELINE, OWN, layers))
            cells += [_mean(own), "" if variant == BASELINE else compared(found), _mean(pool)]
        rows.append(f"| `{variant}` | {len(own)} | " + " | ".join(cells) + " |")
    return rows


def _variants(increases: Sequence[Increase]) -> list[str]:
    there = {one.variant for one in increases}
    return [*(name for name in LABELS if name in there), *sorted(there - LABELS.keys())]


def _mean(values: Mapping[int, float]) -> str:
    return f"{np.mean(list(values.values())):.3f}"


def draw(increases: Sequence[Increase], path: Path) -> None:
    """Draw the nats by layer, experts drawn from the layer's own, with 95 % intervals over seeds.

    Variants without a label are left out.
    """
    figure = new_figure(8.0, 4.2)
    axes: Axes = figure.subplots()
    variants = [variant for variant in _variants(increases) if variant in LABELS]
    depth = 1 + max(one.layer for one in increases)
    for number, (variant, colour) in enumerate(zip(variants, SERIES, strict=False)):
        spreads = [spread(list(by_seed(increases, variant, OWN, [layer]).values())) for layer in range(depth)]
        x = np.arange(depth) + 0.12 * (number - (len(variants) - 1) / 2)
        means = [s.mean for s in spreads]
        axes.errorbar(x, means, [s.high - s.mean for s in spreads], fmt="o", color=colour, ms=5, lw=1.2, capsize=2)
        axes.plot(x, means, color=colour, lw=0.8, alpha=0.5)
        axes.plot([], [], "o-", color=colour, ms=5, lw=1, label=LABELS[variant])
    axes.set_xticks(range(depth))
    axes.set_xlabel("layer")
    axes.set_ylabel("nats that random experts add")
    axes.set_ylim(bottom=0)
    panel_title(axes, "Random experts of the layer's own in one layer")
    style_axes(axes)
    add_legend(axes, loc="upper right")
    write_svg(figure, path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("probes", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(probes: Path, out: Path) -> None:
    """Compare the probes of a sweep's runs in PROBES; write a picture and all numbers to OUT.

    \b
    Example:
      unipool probe randomize runs/sweeps/narrow/unipool/seed_0 --layers all --json > runs/probes/unipool-0.json
      python -m tests.benchmarks.randomized runs/probes docs/results/narrow
    """
    increases = read(probes)
    draw(increases, out / "randomized.svg")
    write_csv(out / "randomized.csv", increases)
    print("\n".join(table(increases)))


if __name__ == "__main__":
    main()
