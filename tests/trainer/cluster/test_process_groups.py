"""The groups that join the roles: waits inside a step have a short limit, those outside a long one."""

from __future__ import annotations

import time

from tests.distributed import join, run_ranks
from tests.training import tiny
from trainer.config.recipe import Recipe


def test_a_barrier_waits_longer_than_a_step() -> None:
    first, second = run_ranks(2, _late, tiny(parallel={"pool_ranks": 1, "timeout_seconds": 1.0}))
    assert first["barrier"] == second["barrier"] == "passed"
    assert "timed out" in first["sum"]


def _late(recipe: Recipe) -> dict[str, str]:
    """Rank 1 comes late, by more than the step's time limit, to a barrier and to a sum."""

    job = join(recipe)
    result = {}
    for name, wait in (("barrier", job.barrier), ("sum", lambda: job.sum_over_ranks([1.0]))):
        if job.rank == 1:
            time.sleep(3)
        try:
            wait()
            result[name] = "passed"
        except RuntimeError as error:
            result[name] = str(error)
    return result
