"""The page and the picture of `tests.benchmarks.fine_tuning`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.axes import Axes

from tests.benchmarks import fine_tuning
from tests.benchmarks.fine_tuning import Run
from tests.benchmarks.report import commit, machine
from trainer.common.atomic import atomic_write
from trainer.common.figure_style import (
    INK,
    QUIET,
    SERIES,
    add_legend,
    new_figure,
    panel_title,
    style_axes,
    write_png_and_svg,
)
from trainer.sweep.statistics import Difference, paired, spread

Pair = tuple[str, str]
NAMES = {"unipool": "shared pool", "vanilla": "private experts"}


def before(runs: Sequence[Run], model: str) -> Run:
    """Return the losses of a model as it was."""
    return next(run for run in runs if run.model == model and run.method == "none")


def reported(runs: Sequence[Run], chosen: Mapping[Pair, float]) -> dict[Pair, dict[int, Run]]:
    """Return the runs that are reported, by seed."""
    return {
        pair: {
            run.seed: run
            for run in runs
            if (run.model, run.method) == pair and run.rate == rate and run.seed in fine_tuning.SEEDS
        }
        for pair, rate in chosen.items()
    }


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """Return mean and half width of the 95 % interval over seeds."""
    found = spread(values)
    return f"{found.mean:{form}} ± {found.high - found.mean:.3f}"


def compared(found: Difference) -> str:
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def comparisons(runs: Sequence[Run], groups: Mapping[Pair, dict[int, Run]]) -> list[str]:
    """Return rows of the table of differences, paired by seed."""

    def values(pair: Pair, what: str) -> dict[int, float]:
        base = before(runs, pair[0])
        return {seed: getattr(run, what) - getattr(base, what) for seed, run in groups[pair].items()}

    rows = []
    for one, other in (
        *((("unipool", method), ("vanilla", method)) for method in ("full", "frozen pool", "LoRA on the pool")),
        (("unipool", "LoRA on the pool"), ("unipool", "LoRA on the pool by layer")),
        (("unipool", "LoRA on the pool"), ("unipool", "LoRA on attention")),
        (("unipool", "frozen pool"), ("unipool", "full")),
    ):
        cells = [compared(paired(values(one, what), values(other, what))) for what in ("new", "old")]
        first, second = (f"{method}, {NAMES[model]}" for model, method in (one, other))
        rows.append(f"| {first} | {second} | {cells[0]} | {cells[1]} |")
    return rows


def draw(runs: Sequence[Run], chosen: Mapping[Pair, float], path: Path) -> None:
    """Draw the losses on old text over those on new text: a panel for each model."""
    figure = new_figure(10.0, 4.6)
    panels: Sequence[Axes] = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = (*SERIES, INK, "#b03a48")
    groups = reported(runs, chosen)
    for axes, model in zip(panels, NAMES, strict=True):
        base = before(runs, model)
        axes.plot(base.new, base.old, "*", color=QUIET, ms=12, label="before", zorder=3)
        for colour, method in zip(colours, fine_tuning.METHODS, strict=True):
            if (model, method) not in chosen:
                continue
            tried = sorted((r for r in runs if (r.model, r.method, r.seed) == (model, method, 0)), key=lambda r: r.rate)
            axes.plot([r.new for r in tried], [r.old for r in tried], ".:", color=colour, lw=0.9, ms=4)
            made = groups[model, method].values()
            axes.plot([r.new for r in made], [r.old for r in made], "o", color=colour, ms=6, label=method)
        panel_title(axes, f"{NAMES[model].capitalize()} (`{model}`)".replace("`", ""))
        axes.set_xlabel("loss on the new text (C++), nats")
        style_axes(axes, "both")
    panels[0].set_ylabel("loss on the old text (Python), nats")
    add_legend(panels[0])
    for file in write_png_and_svg(figure, path):
        if file.suffix == ".png":
            file.unlink()


def page(runs: Sequence[Run], chosen: Mapping[Pair, float]) -> str:
    """Write the page of the documents."""
    import torch

    f = fine_tuning
    groups = reported(runs, chosen)
    lines = [
        "# Fine-tuning",
        "",
        f"`python -m tests.benchmarks.fine_tuning`, commit {commit()}, {machine()}, torch {torch.__version__}.",
        "",
        "Two trained quickstarts with as many parameters (one seed each), one with a pool of 64 experts that 8 layers "
        "share and one with 8 private experts in each layer, learn C++: the headers of torch. The old text is Python's "
        f"library, on which they were trained. A run has {f.STEPS} steps of {f.BATCH} windows of {f.WINDOW} tokens, in "
        f"an order that its seed decides; losses are over {f.TEST_ROWS} windows of each text that no run has seen.",
        "",
        "| experts | trained | parameters | learning rate | new text | old text minus before |",
        "|---|---|---|---|---|---|",
    ]
    for model, name in NAMES.items():
        base = before(runs, model)
        lines.append(f"| {name} | nothing | 0 |  | {base.new:.3f} | (loss {base.old:.3f}) |")
        for pair, made in groups.items():
            if pair[0] != model:
                continue
            some = list(made.values())
            edge = " *" if chosen[pair] in (f.rates_of(pair[1])[0], f.rates_of(pair[1])[-1]) else ""
            rise = interval([run.old - base.old for run in some], "+.3f")
            lines.append(
                f"| {name} | {pair[1]} | {some[0].parameters:,} | {chosen[pair]:g}{edge} | "
                f"{interval([run.new for run in some])} | {rise} |"
            )
    lines += [
        "",
        f"Intervals are 95 % over seeds {', '.join(map(str, f.SEEDS))}. The rate is the best of three by other new "
        "text with seed 0; a star marks one at the end of its range, beyond which another might be better. LoRA has "
        f"rank {f.RANK}, and by layer rank 1 in each of the 8 layers: as many parameters.",
        "",
        "Paired by seed, change of the loss by the first minus that by the second:",
        "",
        "| first | second | new text | old text |",
        "|---|---|---|---|",
        *comparisons(runs, groups),
        "",
        "![Losses on old over new text; dots joined by lines are the three rates of seed 0](fine-tuning.svg)",
        "",
        "[All runs](runs.csv).",
    ]
    return "\n".join(lines) + "\n"


def write_page(runs: Sequence[Run], chosen: Mapping[Pair, float], out: Path) -> None:
    """Write page, picture and the table of all runs."""
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Run)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for run in sorted(runs, key=lambda run: run.key))
    atomic_write(out / "runs.csv", lambda file: file.write_text(table.getvalue()))
    atomic_write(out / "README.md", lambda file: file.write_text(page(runs, chosen)))
    draw(runs, chosen, out / "fine-tuning")
