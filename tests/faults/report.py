"""The table of what came of the faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table, in Markdown."""
    rows = ["| | fault | hits | layout | in | status | s | it says | resumed after | verdict |"]
    rows.append("|---" * 10 + "|")
    for r in sorted(records, key=lambda record: record["number"]):
        said = r["said"].replace("|", "\\|")[:160]
        verdict = "; ".join(problem.splitlines()[0] for problem in r["problems"]) or "ok"
        resumed = ", ".join(map(str, r["resumed"]))
        cells = [r["number"], r["fault"], r["victim"], r["layout"], r["phase"], r["status"], r["seconds"], said]
        rows.append(f"| {' | '.join(map(str, cells))} | {resumed} | {verdict} |")
    return "\n".join(rows) + "\n"
