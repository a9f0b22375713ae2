"""A sample of `python -m tests.faults`: few faults, each in another layout and phase, all at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

from tests.faults.catalogue import ALL_PLACES, FAULTS, PLACES, choose_cases
from tests.faults.jobs import Pause, undisturbed
from tests.faults.running import run_case
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
