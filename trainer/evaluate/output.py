"""What commands print and keep about a model: tables, notes and eval.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.common.atomic import write_whole
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads

if TYPE_CHECKING:
    from rich.table import Table

RECORD_FILE = "eval.json"


class Result(Protocol):
    """A result that can be printed."""

    def tables(self) -> list[Table]: ...

    def notes(self) -> list[str]:
        """Return the lines to print below the tables."""


def print_result(result: Result) -> None:
    """Print the tables and notes of a result."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(*result.tables(), sep="\n")
    for line in result.notes():
        console.print(f"- {line}", style="dim", markup=False)


def table(title: str | None, *columns: str) -> Table:
    """Make a table whose first column is aligned to the left, and the others to the right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def plus_minus(value: float, spread: float | None, form: str) -> str:
    """Format a number and its spread, if it has one, as in "0.25 ± 0.01"."""
    return f"{value:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def save_result(folder: Path, checkpoint: str, what: str, result: dict[str, Any]) -> Path:
    """Add a result to eval.json, and return the file's path.

    Args:
        folder: The folder of the run or of the export.
        checkpoint: What was evaluated: the key of the outer object.
        what: What was measured: the key of the inner object.
        result: The result, which replaces an earlier one of the same keys.

    Raises:
        UserError: eval.json is something else, or cannot be written.
    """
    path = folder / RECORD_FILE
    try:
        record = loads(path.read_text()) if path.exists() else {}
        record.setdefault(checkpoint, {})[what] = result
        write_whole(path, lambda partial: partial.write_text(dumps(record, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the result is printed above") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: is not a record of `eval`; move it away (the result is printed above)") from None
    return path
