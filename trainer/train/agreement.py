"""What all ranks of a job must agree on: schedule and data before the first step, and where the experts live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pool.placement import Placement, imbalance, more_even
from trainer.checkpoint.format import Role, choose_placement
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


def agreed_placement(job: Job, recipe: Recipe, checkpoint: Path | None) -> Placement | None:
    """Return where the experts live at the start, the same on all ranks; None for a dense model.

    Args:
        checkpoint: The checkpoint from which the run resumes, if any.
    """
    return _agreed(job, recipe, "placement", lambda: choose_placement(recipe, checkpoint))


def agreed_move(job: Job, recipe: Recipe, role: Role, done: int) -> Placement | None:
    """Return where the experts shall move after `done` steps, the same on all ranks; None if they stay.

    A run that resumes from the checkpoint after these steps decides the same (`choose_placement`).
    """
    placement = role.placement
    if not placed_by_load(recipe, done) or placement is None or placement.shards == 1:
        return None

    def choose() -> Placement:
        load_LM = role.recorded_load()
        assert load_LM is not None, "rank 0 is a trunk rank"
        found = more_even(torch.from_numpy(load_LM), placement, recipe.model.groups)
        if found != placement:
            before, after = (imbalance(torch.from_numpy(load_LM), p) for p in (placement, found))
            say(
                f"unipool: the experts move after step {done}: load of the shards (max/mean), each layer alone "
                f"{before.lockstep:.2f} -> {after.lockstep:.2f}, all together {before.mixed:.2f} -> {after.mixed:.2f}"
            )
        return found

    found = _agreed(job, recipe, f"placement/{done}", choose)
    return None if found == placement else found


def _agreed(job: Job, recipe: Recipe, key: str, choose: Callable[[], Placement | None]) -> Placement | None:
    """Return what rank 0 chooses."""

    def order() -> str:
        chosen = choose()
        return dumps(list(chosen.order) if chosen else None)

    agreed = loads(job.shared.broadcast(key, order))
    return Placement(tuple(agreed), recipe.grid.expert_parallel) if agreed else None
