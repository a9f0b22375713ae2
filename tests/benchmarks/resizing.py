"""Pools of another size: a trained run whose pool grows or shrinks, at once and after more steps of the same tokens.

python -m tests.benchmarks.resizing RUN [--folder runs/resizing]

RUN is a run of `quickstart`. Each start trains on its text, in an order that is the same for all, with new moments.
What has been trained is kept in the folder, where the same command goes on. The page is in docs/results/resizing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from tests.benchmarks.contenders import ROOT
from tests.benchmarks.upcycling import settings, unipool
from trainer.common.atomic import atomic_write
from trainer.config.recipe import Recipe
from trainer.export.exported_model import filled_model
from trainer.export.loaded_model import LoadedModel, load_model
from trainer.export.saved_run import find_run, model_config
from trainer.importing.resize import TOKENS, Usage, measured, resized
from trainer.importing.source import opened
from trainer.importing.upcycle import How
from trainer.probe.adapters import adapt
from trainer.probe.load import load
from trainer.probe.text import Text, mean_loss, read_text

PAGE = ROOT / "docs" / "results" / "resizing" / "README.md"
STEPS = 40
AFTER = ("run.seed=1", f"train.steps={STEPS}", "train.lr=5e-4", "train.min_lr=5e-5", "parallel.pool_ranks=0")
NOISE = ("--noise", "0.01")
STARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "unchanged": (1, ()),
    "twice, exact": (2, ()),
    "twice, noise 0.01": (2, NOISE),
    "1.5 times, exact": (1.5, ()),
    "1.5 times, noise 0.01": (1.5, NOISE),
    "three quarters": (0.75, ()),
}
"""The factor of the number of experts, and options of `resize`."""
HEAD = (
    "| start | experts | validation loss at once | without a token | effective experts "
    f"| loss after {STEPS} steps | without a token | effective experts |"
)


def held_out(loaded: LoadedModel) -> Text:
    """Return held-out text that pruning does not look at."""
    text = read_text(loaded, None, 2 * TOKENS)
    return replace(text, rows_NS1=text.rows_NS1[len(text.rows_NS1) // 2 :])


def choices(path: Path) -> list[str]:
    """Return the rows of the second table: the loss at once without a quarter of the experts, chosen in other ways."""
    loaded, found = load_model(path), []
    text = held_out(loaded)
    with opened(path) as source:
        usage = measured(source, None)
        M = len(usage.load_M)
        ways = {"add least": usage.added_M, "have the least load": usage.load_M.astype(float)}
        ways |= {f"are drawn, seed {seed}": np.random.default_rng(seed).random(M) for seed in range(3)}
        for name, rank_M in tqdm(ways.items(), "choices", unit=" choices"):
            made, _ = resized(source, M * 3 // 4, Usage(usage.load_M, rank_M), How())
            recipe = Recipe.model_validate({**(source.tree or {}), **made.sections})
            model = filled_model(model_config(recipe), made.read, torch.float32).eval()
            found.append(f"| {name} | {mean_loss(adapt(replace(loaded, model=model)), text):.4f} |")
    return ["| the quarter that goes: experts that | validation loss at once |", "|---|---|", *found]


def measure(folder: Path, source: Path, name: str) -> list[str]:
    """Train from one start; return its row of the table."""
    size, options = STARTS[name]
    recipe = find_run(source).recipe
    experts = round(size * recipe.pool.experts)
    start, run = folder / f"{name}, start", folder / name
    if not start.is_dir():
        resize = ("resize", source, start, "--experts", str(experts), *options)
        unipool(*(resize if size != 1 else ("export", source, start)))
    if not (run / "checkpoints" / f"step_{STEPS:08d}").is_dir():
        more = (f"train.init_from={start}", f"pool.experts={experts}", f"data.tokenizer={source / 'tokenizer.json'}")
        pairs = (f"run.dir={run}", f"data.dir={folder / 'data'}", "checkpoint.every=20", *AFTER, *more)
        unipool("train", source / "recipe.yaml", *settings(*pairs))
    text = held_out(load_model(source))
    found = [str(experts)]
    for path in (start, run):
        model = adapt(load_model(path))
        used = load(model, text).pool
        found += [f"{mean_loss(model, text):.4f}", str(used.unused), f"{used.effective:.1f}"]
    return found


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--folder", default="runs/resizing", type=click.Path(path_type=Path), help="Where runs are kept.")
@click.option("--only", type=click.Choice([*STARTS]), help="Train only this, and leave the page.")
def main(source: Path, folder: Path, only: str | None) -> None:
    """Train from every start of the run SOURCE, and write the tables of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in STARTS if only in (None, name)]
    found = {name: measure(folder.resolve(), source.resolve(), name) for name in tqdm(wanted, "starts", unit=" starts")}
    rows = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    rows += [f"| {name} | {' | '.join(row)} |" for name, row in found.items()]
    print("\n".join(rows))
    if only is None:
        rows += ["", *choices(source.resolve())]
        before, mark, after = PAGE.read_text().partition("<!-- table -->\n")
        page = before + mark + "\n".join(rows) + "\n<!-- end -->\n" + after.partition("<!-- end -->\n")[2]
        atomic_write(PAGE, lambda path: path.write_text(page))


if __name__ == "__main__":
    main()
