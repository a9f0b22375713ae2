"""The command `doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from trainer.common.strict_json import dumps
from trainer.config.completion import complete_recipe
from trainer.config.options import json_option, set_option
from trainer.config.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.doctor.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command(short_help="Check whether this machine is ready to train.")
@click.argument("recipe", required=False, shell_complete=complete_recipe)
@set_option
@json_option
def doctor(recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check whether this machine is ready to train: versions, devices, limits, memory, disks, network, clock.

    Each line says what was found and, if need be, how to fix it. With RECIPE, also check what the recipe needs:
    devices for its ranks, memory by the estimate of `plan`, space for checkpoints, its text, free ports. Nothing is
    changed; a file is written to the disks and removed to measure their speed. Each check has a time limit.

    The exit status is 1 if there is an error, and 0 if there are only warnings.

    \b
    Examples:
      unipool doctor
      unipool doctor quickstart
      unipool doctor unipool-182m --set parallel.device=cuda --json
    """
    from tqdm import tqdm

    from trainer.doctor.checks import CHECKS
    from trainer.doctor.findings import examine

    checked = load_recipe(recipe, overrides) if recipe else None
    with tqdm(
        total=len(CHECKS), desc="checking", leave=False, disable=None, bar_format="{desc}: {n} of {total}"
    ) as bar:
        findings = examine(CHECKS, checked, bar.update)
    failed = any(finding.status == "error" for finding in findings)
    if as_json:
        print(dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    sys.exit(1 if failed else 0)


def _print(findings: Sequence[Finding]) -> None:
    from rich.text import Text

    from trainer.common.format import plural
    from trainer.common.tables import new_table, print_tables

    table = new_table("", "", "", "")
    table.columns[1].no_wrap = True
    for column in table.columns:
        column.justify = "left"
    for finding in findings:
        colour = _COLOURS[finding.status]
        found = Text(finding.found)
        if finding.mend:
            found.append(f"; {finding.mend}")
        table.add_row(Text(finding.status, style=colour), finding.about, found)
    counts = [(sum(finding.status == status for finding in findings), status) for status in ("error", "warning")]
    print_tables(table)
    print(", ".join(plural(number, status) for number, status in counts if number) or "all is well")
