"""What a soak finds in its record, on made-up ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.soak.summary import summarise
from tests.soak.watched import Scrapes

STEPS = 60


def sample(at: float, fds: int, rss: int) -> dict[str, Any]:
    processes = {"rank 0": {"pid": 7, "rss": rss << 20, "fds": fds, "threads": 9}}
    return {"at": at, "undisturbed": {"processes": processes}, "disturbed": {"processes": {}}}


def find(
    folder: Path, events: list[dict[str, Any]], losses: list[float], growth: tuple[int, int] = (0, 0)
) -> list[str]:
    """The problems of a soak of an hour, in which a rank's files and MiB grow by `growth`."""
    samples = [sample(60.0 * n, 50 + growth[0] * n // STEPS, 700 + growth[1] * n // STEPS) for n in range(STEPS + 1)]
    for name, lines in (("events", [{"kind": "begin", "at": 0.0}, *events]), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def job(name: str, values: list[float]) -> Any:
        records = [{"step": n, "loss": loss, "seconds": loss} for n, loss in enumerate(values, 1)]
        return SimpleNamespace(name=name, step=len(values), records=lambda: records, scrapes=Scrapes(good=500))

    problems = summarise(folder, job("undisturbed", [5.0, 4.0, 3.0]), job("disturbed", losses), every=20)["problems"]
    assert json.loads((folder / "summary.json").read_text())["problems"] == problems
    return [str(problem) for problem in problems]


KILL = {"kind": "fault", "at": 100.0, "name": "kill -9 of a rank", "victim": "rank 0", "step": 50, "saved": 40}


def resumed(step: int) -> dict[str, Any]:
    return {"kind": "resumed", "at": 130.0, "step": step}


def test_all_is_well(tmp_path: Path) -> None:
    assert find(tmp_path, [KILL, resumed(40)], [5.0, 4.0]) == []


@pytest.mark.parametrize(
    ("events", "losses", "growth", "problem"),
    [
        ([], [5.0, 4.5], (0, 0), "other losses from (2, 'step') on: 1 of 2 records"),
        ([KILL, resumed(20)], [5.0], (0, 0), "resumed after step 20, though step 40 was saved"),
        ([KILL | {"saved": 0}, resumed(5)], [5.0], (0, 0), "45 steps were repeated after kill -9 of a rank"),
        ([{"kind": "hang", "at": 9.0, "step": 3}], [5.0], (0, 0), "hang: no step after 3 at 9 s"),
        ([], [5.0], (12, 0), "rank 0 of the undisturbed job, in 60.0 min: open files grew from 56 to 60"),
        ([], [5.0], (0, 150), "rank 0 of the undisturbed job, in 60.0 min: memory grew from 777 to 827 MiB"),
        ([{"kind": "supervisor ended", "at": 9.0, "job": "disturbed", "status": 2}], [5.0], (0, 0), "status 2"),
    ],
)
def test_what_is_wrong_is_found(
    events: list[dict[str, Any]], losses: list[float], growth: tuple[int, int], problem: str, tmp_path: Path
) -> None:
    (found,) = find(tmp_path, events, losses, growth)
    assert problem in found
