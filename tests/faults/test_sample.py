"""A sample of `python -m tests.faults`: few faults, each in another layout and phase, all at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

from tests.faults.catalogue import ALL_PLACES, FAULTS, PLACES, choose_cases
from tests.faults.jobs import Pause, undisturbed
from tests.faults.report import Record, read_records, write_report
from tests.faults.running import Outcome, run_case
from tests.faults.scene import Case
from tests.trainer.job import write_recipe

pytestmark = pytest.mark.slow

SAMPLE = (
    Case(1, "1+1", "kill -9", "commit of a save", 0, Pause(0, PLACES["commit of a save"].function, number=2)),
    Case(2, "1+1", "metrics.jsonl has zeros at its end", "before the start", 0, None, resumes=True),
)


def test_jobs_survive_a_sample_of_faults(tmp_path: Path) -> None:
    """Each ends in time and names who failed; with its restart it comes to the losses of an undisturbed job."""
    recipe = write_recipe(tmp_path)
    reference = undisturbed(tmp_path / "undisturbed", recipe, "1+1")
    with ThreadPoolExecutor(len(SAMPLE)) as pool:
        outcomes = pool.map(lambda case: run_case(case, tmp_path / str(case.number), recipe, reference), SAMPLE)
        assert {outcome.number: outcome.problems for outcome in outcomes} == {case.number: [] for case in SAMPLE}


def test_every_fault_has_a_place_that_exists() -> None:
    """The calls are still called so, and the same seed chooses the same cases."""
    for place in ALL_PLACES.values():
        module, _, path = place.function.partition(":")
        if module:
            assert callable(reduce(getattr, path.split("."), import_module(module))), place
    cases = choose_cases(2 * len(FAULTS), seed=3)
    assert cases == choose_cases(2 * len(FAULTS), seed=3) != choose_cases(2 * len(FAULTS), seed=4)
    assert {case.fault for case in cases} == set(FAULTS)


def test_results_are_read_again(tmp_path: Path) -> None:
    """The command goes on from its own file, and the page tells what hung and what was lost."""
    assert read_records(tmp_path) == []
    well = Outcome(2, "1+1", "kill -9", "shutdown", "train", False, -9, 0.4, 'said "a, b"', [0], [], 0, [])
    hung = Outcome(1, "2+1", "SIGSTOP", "rendezvous", "rank 1", False, None, 90.0, "", [], [2], 1, ["HUNG for 90 s"])
    records = [Record(well, "abc", "a machine"), Record(hung, "def", "another")]
    write_report(records, 5, tmp_path)
    assert read_records(tmp_path) == [records[1], records[0]]
    page = (tmp_path / "README.md").read_text()
    assert "2 of the 5 cases have run" in page and "abc (a machine); def (another)" in page
    assert "1 hung, 0 lost anything, 1 were not as they should be" in page
    assert "- 1 SIGSTOP (2+1, rendezvous, rank 1): HUNG for 90 s" in page
