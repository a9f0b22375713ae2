"""The commands `watch` and `report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Show a run in the terminal.")
@click.argument("sources", nargs=-1, required=True, metavar="URL...|RUN")
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


@click.command(short_help="Write a report of a run as one HTML file.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="File to write; default: report.html in RUN.",
)
def report(run: Path, out: Path | None) -> None:
    """Write a report of a run as one HTML file: curves, a heat map of the experts' load, and facts.

    The file opens without a network. The report of an unfinished run shows what it has recorded so far.

    \b
    Examples:
      unipool report runs/quickstart
      unipool report runs/quickstart --out quickstart.html
    """
    from trainer.view.report import write_report

    print(write_report(run, out))
