"""The page and the picture of `tests.benchmarks.fine_tuning`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from tests.benchmarks import fine_tuning
from tests.benchmarks.fine_tuning import Run
from tests.benchmarks.report import commit, compared, machine, write_csv
from trainer.common.atomic import atomic_write
from trainer.common.figure_style import (
    INK,
    QUIET,
    SERIES,
    add_legend,
    new_figure,
    panel_title,
    style_axes,
    write_svg,
)
from trainer.sweep.statistics import paired, spread

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


def tried(runs: Sequence[Run], method: str) -> list[Run]:
    """Return the shared pool's runs with seed 0, by learning rate."""
    found = [run for run in runs if (run.model, run.method, run.seed) == ("unipool", method, 0)]
    return sorted(found, key=lambda run: run.rate)


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """Return mean and half width of the 95 % interval over seeds."""
    found = spread(values)
    return f"{found.mean:{form}} ± {found.high - found.mean:.3f}"


def comparisons(runs: Sequence[Run], groups: Mapping[Pair, dict[int, Run]]) -> list[str]:
    """Return rows of the table of differences, paired by seed."""

    def values(pair: Pair, what: str) -> dict[int, float]:
        base = before(runs, pair[0])
        return {seed: getattr(run, what) - getattr(base, what) for seed, run in groups[pair].items()}

    rows = []
    for one, other in (
        (("unipool", "full"), ("vanilla", "full")),
        (("unipool", "LoRA on the pool"), ("vanilla", "LoRA on the pool")),
        *((("unipool", method), ("unipool", "full")) for method in ("frozen pool", "LoRA on the pool")),
        (("unipool", "LoRA on the pool"), ("unipool", "LoRA on the pool by layer")),
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
        label = "before" if model == "unipool" else None
        axes.plot(base.new, base.old, "*", color=QUIET, ms=12, label=label, zorder=3)
        for colour, method in zip(colours, fine_tuning.METHODS, strict=True):
            if model == "unipool":
                some = tried(runs, method)
                axes.plot([r.new for r in some], [r.old for r in some], ".:", color=colour, lw=0.9, ms=5, label=method)
            made = groups.get((model, method), {}).values()
            axes.plot([r.new for r in made], [r.old for r in made], "o", color=colour, ms=6, mfc="none")
        panel_title(axes, NAMES[model].capitalize())
        axes.set_xlabel("loss on the new text (C++), nats")
        style_axes(axes, "both")
    panels[0].set_ylabel("loss on the old text (Python), nats")
    panels[0].plot([], [], "o", color=QUIET, ms=6, mfc="none", label="the same, other seeds")
    panels[0].set_xlim(min(run.new for run in runs) - 0.1, max(before(runs, model).new for model in NAMES) + 0.3)
    highest = max(run.old for pair in groups.values() for run in pair.values())
    panels[0].set_ylim(min(run.old for run in runs) - 0.1, highest + 0.4)
    add_legend(figure, loc="outside right upper")
    write_svg(figure, path)


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
        "Two trained quickstarts with nearly as many parameters (one seed each), one with a pool of 64 experts that 8 "
        "layers share and one with 8 private experts in each layer, learn C++: the headers of torch. The old text is "
        f"Python's library, on which they were trained. A run has {f.STEPS} steps of {f.BATCH} windows of {f.WINDOW} "
        f"tokens, in an order that its seed decides; losses are over {f.TEST_ROWS} windows of each text "
        "that no run has seen.",
        "",
        "## What to train, and shared and private experts",
        "",
        "| experts | trained | parameters | rate | new text, minus before | old text, minus before | old over new |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, name in NAMES.items():
        base = before(runs, model)
        lines.append(f"| {name} | nothing | 0 |  | (loss {base.new:.3f}) | (loss {base.old:.3f}) |  |")
        for pair, made in groups.items():
            if pair[0] == model:
                some = list(made.values())
                gain = interval([run.new - base.new for run in some], "+.3f")
                rise = interval([run.old - base.old for run in some], "+.3f")
                price = interval([(run.old - base.old) / (base.new - run.new) for run in some], ".2f")
                first = f"| {name} | {pair[1]} | {some[0].parameters:,} | {chosen[pair]:g}"
                lines.append(f"{first} | {gain} | {rise} | {price} |")
    lines += [
        "",
        "The last column is what a nat learned of the new text cost on the old one. "
        f"Intervals are 95 % over seeds {', '.join(map(str, f.SEEDS))}; of each model only one was trained, so "
        "they say nothing about other trained models. The model with private experts was behind before. The rate of a "
        "method, for both models, is the "
        f"best one below by other new text with seed 0. LoRA has rank {f.RANK}: one adapter for each expert.",
        "",
        "Paired by seed, change of the loss by the first minus that by the second (95 %):",
        "",
        "| first | second | new text | old text |",
        "|---|---|---|---|",
        *comparisons(runs, groups),
        "",
        "## Learning rates",
        "",
        "The shared pool with seed 0, at each learning rate that was tried:",
        "",
        "| trained | parameters | learning rate | new text, minus before | old text, minus before |",
        "|---|---|---|---|---|",
    ]
    base = before(runs, "unipool")
    for method in f.METHODS:
        for run in tried(runs, method):
            losses = f"{run.new - base.new:+.3f} | {run.old - base.old:+.3f}"
            lines.append(f"| {method} | {run.parameters:,} | {run.rate:g} | {losses} |")
    lines += [
        "",
        "By layer, each of the 8 layers has adapters of its own for the pool, of rank 1, so that there are as many "
        "parameters as with one adapter of rank 8 for all layers.",
        "",
        "![Losses on old over new text; lines join learning rates and may leave the frame](fine-tuning.svg)",
        "",
        "[All runs](runs.csv).",
    ]
    wrapped = [line if line.startswith(("|", "!")) else textwrap.fill(line, 125) for line in lines]
    return "\n".join(wrapped) + "\n"


def write_page(runs: Sequence[Run], chosen: Mapping[Pair, float], out: Path) -> None:
    """Write page, picture and the table of all runs."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", sorted(runs, key=lambda run: run.key))
    atomic_write(out / "README.md", lambda file: file.write_text(page(runs, chosen)))
    draw(runs, chosen, out / "fine-tuning.svg")
