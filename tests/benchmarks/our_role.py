"""A rank of our own trainer on made-up tokens, for benchmarks that take optimizer steps one by one."""

from __future__ import annotations

from tests.training import tokens
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.planning.schedule import make_schedule
from trainer.train.agreement import agreed_placement
from trainer.train.pool_rank import PoolRank
from trainer.train.trunk_rank import TrunkRank


def make_role(recipe: Recipe, job: Job) -> TrunkRank | PoolRank:
    """Make the trunk rank or the pool rank that this process is in the job."""
    schedule, placement = make_schedule(recipe), agreed_placement(job, recipe, None)
    if job.is_trunk:
        data = tokens(recipe)
        return TrunkRank(recipe, job, schedule, placement, SequenceStream([data], 0), SequenceStream([data], None))
    assert placement
    return PoolRank(recipe, job, schedule, placement)
