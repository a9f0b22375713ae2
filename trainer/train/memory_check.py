"""A warning at the start if a rank's GPU seems to have too little memory."""

from __future__ import annotations

import torch

from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.planning.fit import memory_warnings
from trainer.planning.memory import CONTEXT
from trainer.telemetry.console import say


def warn_of_memory(job: Job, recipe: Recipe, lanes: int) -> None:
    """Say so on the first rank of each role if it needs, by the estimate, more than its GPU has.

    It is no error: the estimate is of a CPU's kernels, and a refusal that is wrong would be worse than one that comes
    from the GPU a little later.
    """
    if job.device.type != "cuda" or job.rank not in (0, job.topology.trunk_ranks):
        return
    free, _ = torch.cuda.mem_get_info(job.device)  # other processes may use the GPU too; this one's context exists
    role = "trunk" if job.is_trunk else "pool"
    for warning in memory_warnings(recipe, lanes, free + CONTEXT, f"{job.name}'s GPU", role):
        say(f"warning: {warning}")
