"""What all ranks of a job must agree on before the first step: schedule, data, placement."""

from __future__ import annotations

from pathlib import Path

from pool.placement import Placement
from trainer.checkpoint.format import choose_placement
from trainer.cluster.process_groups import Job
from trainer.cluster.rendezvous import DIFFERENT_RECIPES, Member
from trainer.common.errors import UserError
from trainer.common.strict_json import dumps, loads
from trainer.config.recipe import Recipe
from trainer.data.prepared_data import PreparedData
from trainer.planning.schedule import ScheduleSpec, schedule_of
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
    """Return where the experts live, the same on all ranks; None for a dense model.

    Args:
        checkpoint: The checkpoint from which the run resumes, if any.
    """

    def choose() -> str:
        chosen = choose_placement(recipe, checkpoint)
        return dumps(list(chosen.order) if chosen else None)

    order = loads(job.shared.broadcast("placement", choose))
    return Placement(tuple(order), recipe.grid.expert_parallel) if order else None
