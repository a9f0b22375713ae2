"""What ranks agree on: where experts move while a run goes on."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from pool.placement import contiguous, moments, more_even
from tests.training import tiny
from trainer.planning.schedule import make_schedule
from trainer.train.agreement import agreed_move

LAYOUTS: dict[str, dict[str, Any]] = {
    "dedicated": {"pool_ranks": 2, "lanes": 2},
    "replicas": {"trunk_ranks": 2, "pool_ranks": 4, "expert_parallel": 2, "lanes": 2},
    "every rank": {"layout": "every_rank", "trunk_ranks": 2, "lanes": 2},
}


REASONS: dict[str, dict[str, Any]] = {
    "auto": {"pool": {"experts": 12, "placement": "auto"}},
    "locked": {"pool": {"experts": 12}, "lock": {"allocation": "random"}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reason", REASONS)
def test_experts_move_by_the_schedule_of_all_ranks(layout: str, reason: str) -> None:
    """Rank 0 decides, which may serve a part of the schedule or nothing; a resume knows only the whole one."""
    recipe = tiny(parallel=LAYOUTS[layout], **REASONS[reason])
    schedule, grid = make_schedule(recipe), recipe.grid
    load_LM = np.random.default_rng(0).integers(0, 100, (3, 12)) * [[7], [1], [5]]
    placement = contiguous(12, 1, 2)
    job = MagicMock(rank=0, topology=grid, **{"shared.broadcast": lambda _, choose: choose()})
    role = MagicMock(placement=placement, schedule=schedule, **{"recorded_load.return_value": load_LM})
    served = grid.served_trunk_ranks(0) if grid.every_rank else ()
    role.plan = schedule.step.for_trunk_ranks(served)
    found = agreed_move(job, recipe, role, 2)
    moments_WL = moments(schedule.step.slots, grid, recipe.model.layers)
    assert found and found == more_even(torch.from_numpy(load_LM), placement, 1, moments_WL)
    assert found != more_even(torch.from_numpy(load_LM), placement), "another load would show the schedule's part"
