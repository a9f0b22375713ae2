"""Writing the result of a probe: tables or JSON on stdout, a CSV file, a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.common.atomic import atomic_write
from trainer.common.errors import UserError
from trainer.common.figure_style import write_png
from trainer.common.strict_json import dumps
from trainer.common.tables import print_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class Result(Protocol):
    """The result of a probe: a dataclass, which is its JSON."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the CSV file, which have the same keys."""

    def tables(self) -> list[Table]: ...

    def notes(self) -> list[str]:
        """Return the lines to print below the tables."""

    def draw(self) -> Figure: ...


def check_files(files: Sequence[Path | None]) -> None:
    """Check that the folders of the output files exist.

    Raises:
        UserError: A folder does not exist.
    """
    for file in files:
        if file and not file.resolve().parent.is_dir():
            raise UserError(f"{file}: cannot be written: there is no folder {file.parent}")


def deliver(result: Result, as_json: bool, csv_file: Path | None, picture: Path | None) -> None:
    """Print a result and write its files, each of them completely or not at all.

    Raises:
        UserError: A file cannot be written.
    """
    try:
        if csv_file:
            atomic_write(csv_file, lambda path: _write_csv(result.rows(), path))
        if picture:
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
