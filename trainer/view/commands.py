"""`watch` and `report` of the command line."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="URL...|RUN")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one frame and end; so it is where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and end.")
def watch(sources: tuple[str, ...], interval: float, once: bool, as_json: bool) -> None:
    """Show a run in the terminal: progress, who waits for whom, the load of the experts.

    RUN is a run's folder: its ranks are asked while it goes on, and found again after a restart; else its records are
    shown. Or give the ranks' own pages, of which host:port is enough. Shares of time and loads are of the steps between
    two looks, at first of those since the ranks started.

    \b
    Examples:
      unipool watch runs/quickstart
      unipool watch node-0:9400 node-1:9401
      unipool watch runs/quickstart --json
    """
    from trainer.view.watch import watch as show

    show(sources, interval, once, as_json)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html", help="Default: report.html in RUN."
)
def report(run: Path, out: Path | None) -> None:
    """Write what a run was as one HTML file that opens without a network: curves, heat map of the load, facts.

    It may be going on: the file shows it as far as it has come.

    \b
    Examples:
      unipool report runs/quickstart
      unipool report runs/quickstart --out quickstart.html
    """
    from trainer.view.report import write_report

    print(write_report(run, out))
