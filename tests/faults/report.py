"""The page of what came of the faults: a row for each kind, and a file with a row for each fault."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import commit, machine

Record = Mapping[str, Any]

COLUMNS = ("number", "fault", "layout", "phase", "victim", "status", "statuses", "seconds", "resumed", "lost", "said")


def write_report(records: Sequence[Record], chosen: int, folder: Path) -> None:
    """Write README.md and outcomes.csv of the results that there are, for `chosen` cases."""
    ordered = sorted(records, key=lambda record: record["number"])
    with (folder / "outcomes.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "verdict"])
        for record in ordered:
            cells = [record[name] if isinstance(record[name], str) else json.dumps(record[name]) for name in COLUMNS]
            writer.writerow([*cells, _verdict(record)])
    (folder / "README.md").write_text(page(ordered, chosen))


def _verdict(record: Record) -> str:
    return "; ".join(problem.splitlines()[0] for problem in record["problems"]) or "ok"


def page(records: Sequence[Record], chosen: int) -> str:
    """Return the page, in Markdown."""
    bad = [record for record in records if record["problems"]]
    words = ("hung", "lost")
    hung, lost = (sum(any(w.upper() in p for p in r["problems"]) for r in records) for w in words)
    head = [
        "# Faults",
        "",
        f"`python -m tests.faults`: {len(records)} of the {chosen} cases have run, each a fault in a tiny job",
        "that the real launcher starts, in four layouts.",
        f"Commit {commit()}, {machine()}.",
        f"{hung} hung, {lost} lost anything, {len(bad)} were not as they should be. [All of them](outcomes.csv).",
        "",
        "- **status**: of the attempt that the fault hit. 0: the job went on to its end.",
        "- **s**: the longest time from the fault to the end of that attempt. The limits are 20 s in a step and 60 s",
        "  elsewhere; deepspeed's launcher takes up to 30 s more for each stopped process.",
        "- **repeated**: the most steps that a resume repeated; a checkpoint was due every 2 steps.",
        "",
        "| fault | times | status | s | repeated | what the job says, once |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record["fault"]].append(record)
    rows = [_row(name, cases) for name, cases in sorted(kinds.items())]
    found = [f"- {r['number']}, {r['fault']}, {r['layout']}, {r['phase']}, {r['victim']}: {_verdict(r)}" for r in bad]
    return "\n".join([*head, *rows, *(["", "Not as they should be:", "", *found] if found else [])]) + "\n"


def _row(fault: str, cases: Sequence[Record]) -> str:
    statuses = ", ".join(map(str, sorted({case["status"] for case in cases if case["status"] is not None})))
    said = max((case["said"] for case in cases), key=len).replace("|", "\\|")
    seconds, lost = max(case["seconds"] for case in cases), max(case["lost"] for case in cases)
    return f"| {fault} | {len(cases)} | {statuses} | {seconds:.0f} | {lost} | {_short(said)} |"


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
