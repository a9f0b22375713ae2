"""The results of the faults: a file with a row for each fault, and a page with a row for each kind."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.running import Outcome
from trainer.common.atomic import atomic_write

TEXT = ("fault", "layout", "phase", "victim", "said")
COLUMNS = ("number", *TEXT[:-1], "status", "statuses", "seconds", "resumed", "lost", "said")


@dataclass(frozen=True)
class Record:
    """A row of outcomes.csv: what came of a case, with one line about each problem, and on what it was tried."""

    outcome: Outcome
    commit: str
    machine: str

    @property
    def place(self) -> str:
        """Which case it is."""
        o = self.outcome
        return f"{o.number} {o.fault} ({o.layout}, {o.phase}, {o.victim})"

    @property
    def verdict(self) -> str:
        """What is not as it should be, or "ok"."""
        return "; ".join(problem.splitlines()[0] for problem in self.outcome.problems or []) or "ok"


def read_records(folder: Path) -> list[Record]:
    """Return the results that an earlier command left in `folder`."""
    path = folder / "outcomes.csv"
    if not path.exists():
        return []
    records = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: row[name] if name in TEXT else json.loads(row[name]) for name in COLUMNS}
            problems = [] if row["verdict"] == "ok" else [row["verdict"]]
            records.append(Record(Outcome(**values, problems=problems), row["commit"], row["machine"]))
    return records


def write_report(records: Iterable[Record], chosen: int, folder: Path) -> None:
    """Write README.md and outcomes.csv of the results that there are, for `chosen` cases."""
    ordered = sorted(records, key=lambda record: record.outcome.number)
    atomic_write(folder / "outcomes.csv", lambda path: _write_rows(ordered, path))
    atomic_write(folder / "README.md", lambda path: path.write_text(page(ordered, chosen)))


def _write_rows(records: Sequence[Record], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "verdict", "commit", "machine"])
        for record in records:
            values = {name: getattr(record.outcome, name) for name in COLUMNS}
            cells = [value if name in TEXT else json.dumps(value) for name, value in values.items()]
            writer.writerow([*cells, record.verdict, record.commit, record.machine])


def page(records: Sequence[Record], chosen: int) -> str:
    """Return the page, in Markdown."""
    bad = [record for record in records if record.outcome.problems]
    hung, lost = (sum(word in record.verdict for record in bad) for word in ("HUNG", "LOST"))
    tried = sorted({f"{record.commit} ({record.machine})" for record in records})
    head = [
        "# Faults",
        "",
        f"`python -m tests.faults`: {len(records)} of the {chosen} cases have run, each a fault in a tiny job",
        "that the real launcher starts, in four layouts.",
        f"Tried on: {'; '.join(tried)}.",
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
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for record in records:
        kinds[record.outcome.fault].append(record.outcome)
    rows = [_row(name, cases) for name, cases in sorted(kinds.items())]
    found = [f"- {record.place}: {record.verdict}" for record in bad]
    return "\n".join([*head, *rows, *(["", "Not as they should be:", "", *found] if found else [])]) + "\n"


def _row(fault: str, cases: Sequence[Outcome]) -> str:
    statuses = ", ".join(map(str, sorted({case.status for case in cases if case.status is not None})))
    said = max((case.said for case in cases), key=len).replace("|", "\\|")
    seconds, lost = max(case.seconds for case in cases), max(case.lost for case in cases)
    return f"| {fault} | {len(cases)} | {statuses} | {seconds:.0f} | {lost} | {_short(said)} |"


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
