"""Tables on stdout."""

from __future__ import annotations

import io
import re
import sys

import pytest

from trainer.common.tables import new_table, print_names, print_tables


def test_a_table_with_notes(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("sizes", "name", "value")
    table.add_row("[bold]pool[/bold] :smile:", "12")
    print_tables(table, notes=("A note " + "that is long " * 20 + "[end].",))
    out = capsys.readouterr().out.splitlines()
    assert out[0].strip() == "sizes"
    assert any(line.split() == ["name", "value"] for line in out)
    assert any(line.split() == ["[bold]pool[/bold]", ":smile:", "12"] for line in out)
    assert out[-1].startswith("- A note") and out[-1].endswith("[end].")


def test_a_wide_table_is_not_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("wide", *(f"column number {place}" for place in range(12)))
    table.add_row(*("x" * 15 for _ in range(12)))
    print_tables(table)
    assert "x" * 15 + "   " + "x" * 15 in capsys.readouterr().out


def test_without_headings_there_is_no_heading_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("facts", "", "")
    table.add_row("layers", "8")
    print_tables(table)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        ["facts"],
        ["layers", "8"],
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_long_texts_go_on_below_themselves(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of 40 columns; in a pipe they stay on one line."""
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    print_names({"a": "one", "longer": "a text that needs-a second line here"})
    print_tables(new_table("t"), notes=("a note that goes on, below itself as well",))
    said = re.sub(r"\x1b\[\d+m", "", out.getvalue()).splitlines()
    assert [line for line in said if line.strip() not in ("", "t")] == (
        [
            "a       one",
            "longer  a text that needs-a second line",
            "        here",
            "- a note that goes on, below itself as",
            "  well",
        ]
        if terminal
        else [
            "a       one",
            "longer  a text that needs-a second line here",
            "- a note that goes on, below itself as well",
        ]
    )
