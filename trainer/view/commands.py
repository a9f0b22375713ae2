"""The commands `watch`, `report` and `own`."""

from __future__ import annotations

from pathlib import Path

import click

from trainer.common.errors import UserError
from trainer.common.strict_json import dumps
from trainer.common.tables import print_tables
from trainer.config.completion import RunPath, complete_run
from trainer.config.options import json_option


@click.command(short_help="Show a run in the terminal.")
@click.argument("sources", nargs=-1, required=True, metavar="URL...|RUN", shell_complete=complete_run)
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two updates."
)
@click.option("--once", is_flag=True, help="Print one frame; this is the default if stdout is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def watch(sources: tuple[str, ...], interval: float, once: bool, as_json: bool) -> None:
    """Show a run in the terminal: its progress, who waits for whom, and the load of the experts.

    RUN is the folder of a run. While the run is training, its ranks are asked for their metrics, also after a restart;
    otherwise its records are shown. Instead of a folder, give the addresses of the ranks' pages; host:port is enough.
    Shares of time and loads cover the steps since the last update, at first all steps since the start.

    \b
    Examples:
      unipool watch runs/quickstart
      unipool watch node-0:9400 node-1:9401
      unipool watch runs/quickstart --json
    """
    from trainer.view.watch import watch as show

    show(sources, interval, once, as_json)


@click.command(short_help="Write a report of a run, or of several beside one another, as one HTML file.")
@click.argument("runs", nargs=-1, required=True, type=RunPath(), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="File to write; default: report.html in RUN, or comparison.html in the first RUN.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a report of a run as one HTML file: curves, what the time went into, the experts by depth, and facts.

    Of several runs, up to eight, the file shows what differs: results and recipes side by side, curves over tokens and
    over hours, and the difference to the first run.

    The file opens without a network. The report of an unfinished run shows what it has recorded so far.

    \b
    Examples:
      unipool report runs/quickstart
      unipool report runs/quickstart --out quickstart.html
      unipool report runs/quickstart runs/unipool-182m
    """
    if len(runs) > 1:
        from trainer.view.report.comparison import write_comparison

        print(write_comparison(runs, out))
        return
    from trainer.view.report.page import write_report

    print(write_report(runs[0], out))


@click.command(short_help="Show which layer owns, or would own, which experts.")
@click.argument("run", type=RunPath())
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1),
    help="Share of each layer's tokens that is wanted inside its own set.  [default: lock.coverage, or 0.95]",
)
@json_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Write a picture.")
def own(run: Path, coverage: float | None, as_json: bool, out: Path | None) -> None:
    """Show which experts each layer of RUN, a run or one of its checkpoints, owns.

    Without a lock, or before it, show what each layer would own if the pool were divided by the recorded load. Every
    layer gets equally many experts and every expert one owner, so that layers find most of their tokens inside their
    own sets.

    \b
    Examples:
      unipool own runs/quickstart
      unipool own runs/quickstart --coverage 0.8 --out own.png
    """
    from trainer.view.ownership import read_ownership

    found = read_ownership(run, coverage)
    if out:
        from trainer.common.figure_style import write_png

        try:
            write_png(found.draw(), out)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if as_json:
        print(dumps(found.as_json()))
        return
    print_tables(found.table(), notes=found.notes())
    if out:
        print(out)
