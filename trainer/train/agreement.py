"""What all ranks of a job must agree on: schedule and data before the first step, and where the experts live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pool.placement import Placement, in_flight, moments, more_even
from pool.schedule import PoolSchedule
from trainer.checkpoint.format import choose_placement
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import DIFFERENT_RECIPES, Member
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads
from trainer.config.lock import placed_by_load
from trainer.config.recipe import Recipe
from trainer.data.prepared_data import PreparedData
from trainer.planning.schedule import ScheduleSpec, schedule_of
from trainer.telemetry.console import say
from trainer.telemetry.run_folder import RunFolder
from trainer.train.pool_rank import PoolRank
from trainer.train.trunk_rank import TrunkRank


def agreed_schedule(member: Member, recipe: Recipe, folder: RunFolder, resume: bool) -> ScheduleSpec:
    """Return the schedule that rank 0 reads from the run's folder or builds, the same on all ranks.

    Raises:
        UserError: This rank was started with another recipe than rank 0.
    """
    text = member.shared.broadcast("schedule", lambda: schedule_of(recipe, folder.plan_file, resume).to_json())
    agreed = ScheduleSpec.from_json(recipe, text)
    if agreed is None:
        raise UserError(DIFFERENT_RECIPES)
    return agreed


def agreed_data(job: Job, prepared: PreparedData | None) -> str:
    """Return what identifies the prepared data, the same on all ranks.

    Raises:
        UserError: This trunk rank has other data than rank 0.
    """
    own = prepared.identity if prepared else ""
    agreed = job.shared.broadcast("data", lambda: own)  # rank 0 is a trunk rank
    if prepared and own != agreed:
        raise UserError(
            f"data: the prepared data of {job.name} ({prepared.files('train')}) differs from that of rank 0: give all "
            "nodes the same data.source, or let them share data.dir"
        )
    return agreed


def agreed_placement(
    job: Job, recipe: Recipe, checkpoint: Path | None, plan: PoolSchedule | None = None
) -> Placement | None:
    """Return where the experts live at the start, the same on all ranks; None for a dense model.

    Args:
        checkpoint: The checkpoint from which the run resumes, if any.
        plan: Schedule of an optimizer step, for which experts are placed by a recorded load.
    """
    moments_WL = _moments(job, recipe, plan) if plan and checkpoint else None
    return _agreed(job, recipe, "placement", lambda: choose_placement(recipe, checkpoint, moments_WL))


def agreed_move(job: Job, recipe: Recipe, role: TrunkRank | PoolRank, done: int) -> Placement | None:
    """Return where the experts shall move after `done` steps, the same on all ranks; None if they stay.

    A run that resumes from the checkpoint after these steps decides the same (`choose_placement`).
    """
    placement = role.placement
    if not placed_by_load(recipe, done) or placement is None or placement.shards == 1:
        return None

    def choose() -> Placement:
        counts_LM = role.recorded_load()
        assert counts_LM is not None, "rank 0 is a trunk rank"
        load_LM, moments_WL = torch.from_numpy(counts_LM), _moments(job, recipe, role.schedule.step)
        found = more_even(load_LM, placement, recipe.model.groups, moments_WL)
        if found != placement:
            before, after = (in_flight(load_LM, p, moments_WL) for p in (placement, found))
            say(
                f"unipool: the experts move after step {done}: work in flight of the shards (max/mean) "
                f"{before:.2f} -> {after:.2f}"
            )
        return found

    found = _agreed(job, recipe, f"placement/{done}", choose)
    return None if found == placement else found


def _moments(job: Job, recipe: Recipe, plan: PoolSchedule) -> Tensor | None:
    """Return what is in flight together, where there is a pool to be placed by it."""
    placed = recipe.pool.placement == "auto" or recipe.lock is not None
    wanted = placed and not job.topology.colocated and job.rank == 0
    return moments(plan.slots, job.topology, recipe.model.layers) if wanted else None


def _agreed(job: Job, recipe: Recipe, key: str, choose: Callable[[], Placement | None]) -> Placement | None:
    """Return what rank 0 chooses."""

    def order() -> str:
        chosen = choose()
        return dumps(list(chosen.order) if chosen else None)

    agreed = loads(job.shared.broadcast(key, order))
    return Placement(tuple(agreed), recipe.grid.expert_parallel) if agreed else None
