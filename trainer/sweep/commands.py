"""The command `sweep`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.common.tables import print_names
from trainer.config.completion import Items, complete_setting, named_or_file

if TYPE_CHECKING:
    from trainer.sweep.spec import Experiment


def _complete(context: click.Context, parameter: click.Parameter, begun: str) -> Items:
    """Complete a sweep: the names, and YAML files."""
    from trainer.sweep.spec import headline, sweep_names

    return named_or_file(sweep_names(), headline, begun)


@click.command(short_help="Train variants of a recipe and compare them with a baseline.")
@click.argument("source", required=False, metavar="SWEEP", shell_complete=_complete)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_setting,
    help="Override a recipe key for every run.",
)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help="Folder for the runs.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of runs at a time. They share the cores evenly, unless OMP_NUM_THREADS is set.",
)
@click.option("--force", is_flag=True, help="Move runs of other recipes out of the way and train again.")
@click.option("--write-recipes", is_flag=True, help="Only write the recipe of each run, for `train` on a cluster.")
@click.option("--report", is_flag=True, help="Only make the table and the pictures of the finished runs.")
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
    """Train variants of a recipe with several seeds and compare them with a baseline.

    SWEEP is a name (see --list), a YAML file, or the folder of a sweep that was started before. All recipes are checked
    before anything starts. The runs are in DIR/VARIANT/seed_N. Finished runs are skipped; interrupted ones resume from
    their last checkpoint. At the end, DIR has result.json, result.csv and the pictures. For --report, a folder with a
    result.json is enough.

    After Ctrl-C or SIGTERM the runs save a checkpoint and stop; the same command resumes the sweep. Exit status: 0 if
    all runs are finished, 1 if some failed, 130 after Ctrl-C, 75 after SIGTERM.

    \b
    Examples:
      unipool sweep small-reproduction --jobs 2
      unipool sweep small-table-5 --set train.steps=1000 --dir runs/sweeps/long
      unipool sweep runs/sweeps/small-reproduction --report
      unipool sweep table-5 --write-recipes
    """
    from trainer.cluster.launch import launched
    from trainer.sweep.spec import SWEEP_FILE, headline, load_sweep, sweep_names

    if listed:
        names = {name: headline(name) for name in sweep_names()}
        if as_json:
            print(dumps(names))
        else:
            print_names(names)
        return
    if source is None:
        raise UserError("sweep: give the name of a sweep (see unipool sweep --list), its file, or its folder")
    if launched():
        raise UserError(
            "sweep: it starts its runs itself and cannot run under a launcher; use --write-recipes for that"
        )
    if report and os.path.isdir(source) and not (Path(source) / SWEEP_FILE).exists():
        _show(Path(source), as_json)
        return
    experiment = load_sweep(source, overrides, folder)
    if jobs > 1 and (taken := [cell.name for cell in experiment.cells if cell.recipe.metrics.port]):
        raise UserError(f"--jobs {jobs}: all runs would use the metrics.port of {taken[0]}; set metrics.port=0")
    if report:
        if not experiment.folder.is_dir():
            raise UserError(f"--report: the folder {experiment.folder} does not exist; train first, or give --dir")
        _show(experiment.folder, as_json, experiment)
        return
    from trainer.sweep.runs import Runner, check_folders, write_recipe
    from trainer.telemetry.console import say

    check_folders(experiment, force)
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        experiment.save()
    except OSError as error:
        raise UserError(f"{experiment.folder}: cannot be written ({error.strerror}); choose another --dir") from None
    for warning in experiment.warnings():
        say(f"warning: {warning}")
    if write_recipes:
        for run in experiment.runs:
            write_recipe(run)
            print(run.recipe_file)
        return
    status = Runner(experiment, jobs).run()
    _show(experiment.folder, as_json, experiment)
    sys.exit(status)


def _show(folder: Path, as_json: bool, experiment: Experiment | None = None) -> None:
    """Print the result of an experiment and write its files and pictures; without one, the result is read instead."""
    from trainer.sweep.plot import write_pictures
    from trainer.sweep.result import JSON_FILE, collect, read_result, to_json, write_files
    from trainer.sweep.table import print_result
    from trainer.telemetry.console import say

    result = collect(experiment) if experiment else read_result(folder / JSON_FILE)
    if as_json:
        print(dumps(to_json(result)))
    else:
        print_result(result)
    try:
        written = [*(write_files(folder, result) if experiment else []), *write_pictures(folder, result)]
    except OSError as error:
        raise UserError(f"{folder}: the result cannot be written ({error.strerror})") from None
    say(f"written: {', '.join(map(str, written))}")
