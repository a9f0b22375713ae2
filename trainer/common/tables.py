"""Tables in a terminal, in a pipe or in a file: every command prints them in the same way."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 250
"""Columns that a table may have where stdout is no terminal; rich would cut it to 80."""


def new_table(title: str, *columns: str) -> Table:
    """Make an empty table: the first column is left-aligned and keeps its text whole, all others hold numbers.

    Args:
        title: Text above the table.
        columns: Headings; if all are empty, the table has no heading line.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        box=SIMPLE, pad_edge=False, title=title, title_justify="left", title_style="bold", show_header=any(columns)
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
    return table


def print_tables(*tables: Table, notes: Sequence[str] = ()) -> None:
    """Print tables and the notes below them to stdout. Text in brackets is printed as it is, not taken for markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    in_terminal = console.is_terminal
    if not in_terminal:
        console.width = _PIPE_WIDTH
    for table in tables:
        console.print(table)
    width = console.width if in_terminal else 10**6
    for note in notes:
        console.print(_wrapped(f"- {note}", width, indent=2), style="dim", soft_wrap=True)


def print_names(texts: Mapping[str, str]) -> None:
    """Print names, and beside each what it is. In a terminal, a text that is too long goes on below itself."""
    column = 2 + max(map(len, texts), default=0)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    for name, text in texts.items():
        width = max(column + 20, columns)
        print(_wrapped(f"{name:<{column}}{text}", width, column))


def _wrapped(text: str, width: int, indent: int) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
