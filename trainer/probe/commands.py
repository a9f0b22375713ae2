"""`probe` on the command line."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.common.tables import print_tables
from trainer.config.completion import complete_run
from trainer.config.options import count_option, json_option, seed_option
from trainer.evaluate.options import TaskOptions, task_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from trainer.evaluate.tasks import Tasks
    from trainer.probe.adapters import MoEModel
    from trainer.probe.effects import Over
    from trainer.probe.text import Text


class Result(Protocol):
    """The result of a probe: a dataclass, which is its JSON."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the CSV file, which have the same keys."""

    def tables(self) -> list[Table]: ...

    def notes(self) -> list[str]:
        """Return the lines to print below the tables."""

    def draw(self) -> Figure: ...


_FILE = click.Path(dir_okay=False, path_type=Path)


def _probe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments of `_run`, which all probes have."""
    for decorate in (
        click.option("--out", type=_FILE, metavar="FILE.png", help="Write a plot."),
        click.option("--csv", "csv_file", type=_FILE, metavar="FILE", help="Write a CSV file."),
        json_option,
        count_option("--tokens", "Tokens to read.", 16_384),
        click.option(
            "--text",
            type=click.Path(exists=True, path_type=Path),
            metavar="FILE",
            help="Text to read, in any format of data.source.  [default: the run's held-out text]",
        ),
        click.argument("source", shell_complete=complete_run),
    ):
        command = decorate(command)
    return command


def _run(
    measure: Callable[[MoEModel, Text], Result],
    source: str,
    text: Path | None,
    tokens: int,
    as_json: bool,
    csv_file: Path | None,
    out: Path | None,
) -> None:
    from trainer.export.loaded_model import finite_outputs
    from trainer.probe.adapters import load as load_source
    from trainer.probe.text import read_text

    for file in (csv_file, out):
        if file and not file.resolve().parent.is_dir():
            raise UserError(f"{file}: cannot be written: there is no folder {file.parent}")
    model = load_source(source, own_text=text is None)
    read = read_text(model.loaded, text, tokens)
    with finite_outputs(model.model, source):
        result = measure(model, read)
    _deliver(result, as_json, csv_file, out)


def _deliver(result: Result, as_json: bool, csv_file: Path | None, picture: Path | None) -> None:
    """Print a result and write its files, each of them completely or not at all.

    Raises:
        UserError: A file cannot be written.
    """
    try:
        if csv_file:
            atomic_write(csv_file, lambda path: _write_csv(result.rows(), path))
        if picture:
            from trainer.common.figure_style import write_png

            write_png(result.draw(), picture)
    except OSError as error:
        raise UserError(f"{error.filename or 'file'}: cannot be written ({error.strerror})") from error
    if as_json:
        print(dumps(asdict(result)))  # type: ignore[call-overload]
        return
    print_tables(*result.tables(), notes=result.notes())
    for file in (csv_file, picture):
        if file:
            print(file)


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@click.group(short_help="Measure what the routing is worth and how experts are used.")
def probe() -> None:
    """Probe a trained model: what its routing is worth, and how it uses its experts.

    SOURCE is a run or one of its checkpoints, an export of format hf, or a Hugging Face model (its folder, or its name
    on the hub) of type Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, OLMoE or Mixtral. All but a run require --text.
    The exit status is 1 if the model computes values that are not finite; then there is no result.

    \b
    Example:
      unipool probe load runs/quickstart --out load.png
    """


@probe.command(short_help="Measure the loss with random experts in one layer.")
@_probe_options
@click.option(
    "--layers",
    default="deep",
    show_default=True,
    help="Layers to randomise: deep (the deep half), all, or numbers from 0, as in 4,6-7.",
)
@click.option(
    "--over",
    "overs",
    multiple=True,
    type=click.Choice(["layer", "pool", "matched"]),
    help="Experts to draw from: those of the layer, the full pool, or the layer's most used ones; can be given several "
    "times.  [default: those that differ]",
)
@count_option("--matched", "Number of most used experts for --over matched.", 8)
@count_option("--draws", "Random draws, for the spread.", 3)
@seed_option
@task_options
def randomize(
    layers: str, overs: tuple[Over, ...], matched: int, draws: int, seed: int, tasks: TaskOptions, **common: Any
) -> None:
    """Measure the loss increase with random experts in one layer, for each layer of the deep half.

    The experts of each token are drawn uniformly; gate values remain the learned ones. The most used experts are
    counted on the text that is read. With --tasks, also measure the accuracy drop: each draw is scored as by `eval`.

    \b
    Examples:
      unipool probe randomize runs/quickstart --out randomize.png
      unipool probe randomize runs/quickstart --layers 4,6-7 --over matched --draws 5
      unipool probe randomize runs/unipool-182m --tasks arc_easy,piqa,hellaswag --limit 500
      unipool probe randomize allenai/OLMoE-1B-7B-0924 --text README.md
    """
    loaded_tasks = _load(tasks) if tasks.names else None
    from trainer.probe.randomize import pick_layers
    from trainer.probe.randomize import randomize as run_probe

    def measure(model: MoEModel, text: Text) -> Result:
        score = partial(loaded_tasks.score, model.loaded) if loaded_tasks else None
        return run_probe(model, text, pick_layers(model, layers), overs, matched, draws, seed, score)

    _run(measure, **common)


def _load(wanted: TaskOptions) -> Tasks:
    """Load the tasks first, because the harness may not be installed, or a task may not exist."""
    from trainer.evaluate.tasks import Tasks
    from trainer.probe.accuracy import NO_ACCURACY

    tasks = Tasks(wanted)
    if not tasks.may_have_accuracy:
        raise UserError(NO_ACCURACY)
    return tasks


@probe.command()
@_probe_options
def reuse(**common: Any) -> None:
    """Count the distinct experts that a token meets over its layers.

    \b
    Example:
      unipool probe reuse runs/quickstart --out reuse.png
    """
    from trainer.probe.reuse import reuse as run_probe

    _run(run_probe, **common)


@probe.command(short_help="Show which layer uses which expert.")
@_probe_options
def load(**common: Any) -> None:
    """Show which layer uses which expert: a heat map, totals, effective experts, coverage, and how layers differ.

    \b
    Example:
      unipool probe load runs/quickstart --out load.png
    """
    from trainer.probe.load import load as run_probe

    _run(run_probe, **common)


@probe.command(short_help="Measure how similar the experts are.")
@_probe_options
@count_option("--sample", "Tokens per layer on which outputs are compared.", 64)
@seed_option
def redundancy(sample: int, seed: int, **common: Any) -> None:
    """Measure how similar experts are: the cosine of their weights, and of their outputs on the same tokens.

    \b
    Example:
      unipool probe redundancy runs/quickstart --out redundancy.png
    """
    from trainer.probe.redundancy import redundancy as run_probe

    _run(partial(run_probe, sampled=sample, seed=seed), **common)
