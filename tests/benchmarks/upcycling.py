"""Upcycled starts against random ones: quickstart's loss over the first steps, at the same tokens.

python -m tests.benchmarks.upcycling [--folder runs/upcycling]

A dense model of quickstart's shape is trained first. Then every start trains on new text, in an order that is the same
for all. What has been trained is kept in the folder, where the same command goes on. The page and the picture are in
docs/results/upcycling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from tests.benchmarks.contenders import ROOT
from trainer.common.atomic import atomic_write
from trainer.common.figure_style import SERIES, add_legend, figure_title, new_figure, style_axes, write_png_and_svg

PAGE = ROOT / "docs" / "results" / "upcycling"
DENSE = ("model.ffn=dense", "pool.experts=0", "balance.pool=0", "parallel.pool_ranks=0")
BATCH = ("train.global_batch=8", "train.micro_batch=8", "eval.batches=8", "checkpoint.every=20")
DENSE_STEPS, STEPS = 160, 100
AFTER = ("run.seed=1", f"train.steps={STEPS}", "train.lr=1e-3", "train.min_lr=1e-4")
"""The seed gives random starts other weights, and the text another order than the dense model saw."""
EXACT = ("--experts", "32", "--top-k", "2")
STARTS: dict[str, tuple[str, ...]] = {
    "dense, trained on": (),
    "softmax, exact": EXACT,
    "softmax, 3 nats and noise 0.01": (*EXACT, "--distance", "3", "--noise", "0.01"),
    "softmax, random": EXACT,
}
SHOWN = (1, 5, 20, 50, 100)


def unipool(*arguments: str | Path) -> None:
    """Run a command of the trainer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "trainer", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def settings(*pairs: str) -> list[str]:
    """Return options of the command line that set keys."""
    return [word for pair in pairs for word in ("--set", pair)]


def trained(run: Path, recipe: str | Path, steps: int, *pairs: str) -> None:
    """Train a run to its end, unless it is there already."""
    if not (run / "checkpoints" / f"step_{steps:08d}").is_dir():
        unipool("train", recipe, *settings(f"run.dir={run}", f"data.dir={run.parent / 'data'}", *BATCH, *pairs))


def measure(folder: Path, name: str, options: tuple[str, ...]) -> Path:
    """Train from one start; return the run's folder."""
    dense, start, run = folder / "dense", folder / f"{name}, start", folder / name
    if not start.is_dir() and options:
        unipool("upcycle", dense, start, *options)
    if not start.is_dir():
        unipool("export", dense, start)
    if options:
        more = ("train.init_from=null",) if name.endswith("random") else ()
        trained(run, start / "recipe.yaml", STEPS, *AFTER, *more)
    else:
        more = (f"train.init_from={start}", f"data.tokenizer={start}")
        trained(run, dense / "recipe.yaml", STEPS, *AFTER, *more)
    return run


def losses(run: Path) -> tuple[list[float], float, float]:
    """Return the training loss of every step, the validation loss at the end, and the distinct experts of a token."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    validation = [record["val_loss"] for record in records if "val_loss" in record]
    return [record["loss"] for record in steps], validation[-1], steps[-1]["distinct_experts"]


def write(found: dict[str, tuple[list[float], float, float]]) -> None:
    """Write the page and the picture."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for (name, (loss, _, _)), colour in zip(found.items(), SERIES, strict=True):
        smooth = np.convolve(loss, np.ones(5) / 5, mode="valid")
        dashes = "--" if name.endswith("random") else "-"
        axes.plot(np.arange(len(smooth)) + 3, smooth, dashes, color=colour, label=name)
    axes.set(xlabel="step", ylabel="training loss, mean of 5 steps")
    style_axes(axes)
    figure_title(figure, "Upcycled and random starts at the same tokens")
    add_legend(axes)
    PAGE.mkdir(parents=True, exist_ok=True)
    write_png_and_svg(figure, PAGE / "loss.png")
    head = "| start | " + " | ".join(f"step {step}" for step in SHOWN) + " | validation | distinct experts of a token |"
    rows = [head, "|---" * (len(SHOWN) + 3) + "|"]
    for name, (loss, validation, distinct) in found.items():
        values = [*(loss[step - 1] for step in SHOWN), validation]
        rows.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {distinct:.1f} |")
    text = (PAGE / "README.md").read_text() if (PAGE / "README.md").is_file() else "# Upcycling\n\n<!-- table -->\n"
    before, mark, after = text.partition("<!-- table -->\n")
    after = after.partition("<!-- end -->\n")[2]
    page = before + mark + "\n".join(rows) + "\n<!-- end -->\n" + after
    atomic_write(PAGE / "README.md", lambda path: path.write_text(page))


@click.command()
@click.option("--folder", default="runs/upcycling", type=click.Path(path_type=Path), help="Where runs are kept.")
@click.option("--only", type=click.Choice(["dense model", *STARTS]), help="Train only this, and write no page.")
def main(folder: Path, only: str | None) -> None:
    """Train from every start, and write the page."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trained(folder / "dense", "quickstart", DENSE_STEPS, *DENSE, f"train.steps={DENSE_STEPS}")
    wanted = [name for name in STARTS if only in (None, name)]
    runs = {name: measure(folder, name, STARTS[name]) for name in tqdm(wanted, "starts", unit=" starts")}
    if only is None:
        write({name: losses(run) for name, run in runs.items()})


if __name__ == "__main__":
    main()
