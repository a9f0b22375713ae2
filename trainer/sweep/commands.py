"""`sweep` of the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps

if TYPE_CHECKING:
    from trainer.sweep.spec import Experiment


@click.command()
@click.argument("source", required=False, metavar="SWEEP")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every run.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Folder of the runs.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Runs at once; the cores are divided among them, unless OMP_NUM_THREADS is set.",
)
@click.option("--force", is_flag=True, help="Put runs of other recipes that are in the way aside, and train anew.")
@click.option("--write-recipes", is_flag=True, help="Only write each run's recipe, for `train` on a cluster.")
@click.option("--report", is_flag=True, help="Only make table and pictures of the runs that are done.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the list, as JSON.")
@click.option("--list", "listed", is_flag=True, help="List the sweeps that come with the trainer.")
def sweep(
    source: str | None,
    overrides: tuple[str, ...],
    folder: Path | None,
    jobs: int,
    force: bool,
    write_recipes: bool,
    report: bool,
    as_json: bool,
    listed: bool,
) -> None:
    """Train variants of a recipe with several seeds, and compare them with a baseline.

    SWEEP is a name (see --list), a YAML file, or the folder of a sweep that has begun. Every recipe is checked before
    anything starts. Runs are in DIR/VARIANT/seed_N; those that are done are left out, begun ones go on from their
    checkpoint. At the end, result.json, result.csv and pictures are in DIR.

    Ctrl-C or SIGTERM: the runs save a checkpoint; the same command goes on. Exit status: 0 all runs are done, 1 some
    failed, 130 after Ctrl-C, 75 after SIGTERM.

    \b
    Examples:
      unipool sweep small-reproduction --jobs 2
      unipool sweep small-table-5 --set train.steps=1000 --dir runs/sweeps/long
      unipool sweep runs/sweeps/small-reproduction --report
      unipool sweep table-5 --write-recipes
    """
    from trainer.sweep.spec import headline, load_sweep, sweep_names

    if listed:
        names = {name: headline(name) for name in sweep_names()}
        print(dumps(names) if as_json else "\n".join(f"{name:<24}{text}" for name, text in names.items()))
        return
    if source is None:
        raise UserError("sweep: name a sweep (unipool sweep --list), its file, or the folder of one that has begun")
    if "RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        raise UserError("sweep: starts its runs itself: not under a launcher; --write-recipes makes recipes for one")
    experiment = load_sweep(source, overrides, folder)
    if jobs > 1 and (taken := [cell.name for cell in experiment.cells if cell.recipe.metrics.port]):
        raise UserError(f"--jobs {jobs}: metrics.port of {taken[0]} is one number for all runs; set metrics.port=0")
    if report:
        if not experiment.folder.is_dir():
            raise UserError(f"--report: {experiment.folder}: not there; train first, or give --dir")
        _report(experiment, as_json)
        return
    from trainer.sweep.runs import Runner, check_places
    from trainer.telemetry.console import say

    check_places(experiment, force)
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        experiment.save()
    except OSError as error:
        raise UserError(f"{experiment.folder}: cannot be written ({error.strerror}); choose another --dir") from None
    for warning in experiment.warnings():
        say(f"warning: {warning}")
    if write_recipes:
        from trainer.sweep.runs import write_recipe

        for run in experiment.runs:
            write_recipe(run)
            print(run.recipe_file)
        return
    status = Runner(experiment, jobs).run()
    _report(experiment, as_json)
    sys.exit(status)


def _report(experiment: Experiment, as_json: bool) -> None:
    """Table, files and pictures of the runs that are done."""
    from trainer.sweep.plot import write_pictures
    from trainer.sweep.result import collect, to_json, write_files
    from trainer.sweep.table import print_table
    from trainer.telemetry.console import say

    rows = collect(experiment)
    if as_json:
        print(dumps(to_json(experiment, rows)))
    else:
        print_table(experiment, rows)
    try:
        written = [*write_files(experiment, rows), *write_pictures(experiment, rows)]
    except OSError as error:
        raise UserError(f"{experiment.folder}: the result cannot be written ({error.strerror})") from None
    say(f"written: {', '.join(map(str, written))}")
