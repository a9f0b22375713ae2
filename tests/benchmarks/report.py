"""The report of every benchmark: a table of ratios with their spread and, with --json, one object on the last line."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.atomic import atomic_write

if TYPE_CHECKING:
    from trainer.sweep.statistics import Difference


def ratios(peer: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast ours was, round by round: the peer's seconds over ours."""
    return [p / o for p, o in zip(peer, ours, strict=True)]


def machine() -> str:
    """Describe the processor and its cores."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """Name the commit, with a mark if files differ from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def compared(found: Difference) -> str:
    """Format a difference over seeds and its interval."""
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def write_csv(path: Path, records: Sequence[Any]) -> None:
    """Write dataclasses of one kind, at least one, as a table: a row for each."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(records[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, records))
    atomic_write(path, lambda file: file.write_text(table.getvalue()))


def print_report(
    title: str, command: str, results: dict[str, list[float]], notes: Sequence[str], as_json: bool
) -> None:
    """Print the median and the range of every result.

    Args:
        title: What was measured.
        command: The command that measures it.
        results: Ratios or seconds of all rounds, by name.
        notes: Lines below the table.
        as_json: Whether to end with one JSON object.
    """
    print(f"{title}\n{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {machine()}\n{command}\n")
    width = max(map(len, results), default=0)
    print(f"{'name':<{width}}  median    min    max  rounds")
    for name, values in results.items():
        median = statistics.median(values)
        print(f"{name:<{width}}  {median:6.2f} {min(values):6.2f} {max(values):6.2f}  {len(values):6d}")
    print()
    for note in notes:
        print(f"- {note}")
    if as_json:
        print(
            json.dumps(
                {
                    "ratios": {name: statistics.median(values) for name, values in results.items()},
                    "spread": {name: [min(values), max(values)] for name, values in results.items()},
                    "commit": commit(),
                    "machine": machine(),
                }
            )
        )
