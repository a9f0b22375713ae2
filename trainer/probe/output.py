"""What a probe hands over: a table, a JSON object, a CSV file, a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

INK, QUIET = "#222222", "#8a8a8a"
SERIES = ("#31688e", "#e08a3c", "#35a06b", "#8d5a97")


class Result(Protocol):
    """What a probe found."""

    def to_json(self) -> dict[str, Any]:
        """All of it."""

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the CSV file, all with the same keys."""

    def tables(self) -> list[Table]: ...

    def notes(self) -> list[str]:
        """Lines under the tables."""

    def draw(self) -> Figure: ...


def check_files(files: Sequence[Path | None]) -> None:
    """Before the work: every file's folder is there.

    Raises:
        UserError: naming the first that is not.
    """
    for file in files:
        if file and not file.resolve().parent.is_dir():
            raise UserError(f"{file}: cannot be written, there is no folder {file.parent}")


def deliver(result: Result, as_json: bool, csv_file: Path | None, picture: Path | None) -> None:
    """Print the result and write its files; each appears whole or not at all.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        if csv_file:
            atomic_write(csv_file, lambda path: _write_csv(result.rows(), path))
        if picture:
            canvas = FigureCanvasAgg(result.draw())
            atomic_write(picture, lambda path: canvas.print_figure(path, format="png"))
    except OSError as error:
        raise UserError(f"{error.filename or 'file'}: cannot be written ({error.strerror})") from error
    if as_json:
        print(dumps(result.to_json()))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(*result.tables(), sep="\n")
    for line in result.notes():
        console.print(f"[dim]- {line}[/dim]")
    for file in (csv_file, picture):
        if file:
            print(file)


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(title: str, *columns: str) -> Table:
    """A table whose first column is left-aligned, the others are numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def quiet(axes: Axes) -> None:
    """Lines and text as in the project's other pictures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=QUIET, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
