"""Where a whole optimizer step reads from tensors on the host: a short list of places, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import join, run_ranks
from tests.host_reads import listed_reads
from tests.training import optimizer_step, tiny, tokens
from trainer.config.recipe import Recipe
from trainer.planning.schedule import make_schedule


def reads_of_a_step(recipe: Recipe) -> list[str]:
    """The reads of this rank in its second step, in order."""
    from trainer.data.batches import SequenceStream
    from trainer.train.agreement import agreed_placement
    from trainer.train.pool_rank import PoolRank
    from trainer.train.trunk_rank import TrunkRank

    job, data = join(recipe), tokens(recipe)
    placement, plan = agreed_placement(job, recipe, None), make_schedule(recipe)
    role: TrunkRank | PoolRank
    if job.is_trunk:
        role = TrunkRank(recipe, job, plan, placement, SequenceStream([data], 0), SequenceStream([data], None))
    else:
        assert placement
        role = PoolRank(recipe, job, plan, placement)
    optimizer_step(job, role, 0)
    with listed_reads() as reads:
        optimizer_step(job, role, 1)
    job.close()
    return reads


THE_READ = "trainer/train/step_results.py (reduce_results): cpu"
"""Losses, loads and norms, without which the host cannot know whether to apply the step."""

ON_THE_HOST = {
    # From numbers that are on the host.
    "trainer/train/step_results.py (reduce_results): tolist",
    "trainer/train/step_results.py (reduce_results): __int__",
    "trainer/train/step_results.py (step_scalars): __float__",
    "trainer/train/step_results.py (step_scalars): __int__",
    "trainer/train/step_results.py (step_scalars): tolist",
    "trainer/train/trunk_rank.py (_serve_metrics): numpy",
    "trainer/telemetry/prometheus.py (served): numpy",
    "trainer/telemetry/prometheus.py (served): __int__",
    "trainer/cluster/process_groups.py (sum_over_ranks): tolist",
    "router/load.py (specialisation): __float__",
    # RoleEngine gives DeepSpeed's ZeRO the norm over both roles on the host.
    "deepspeed/runtime/utils.py (is_invalid_grad_norm): __bool__",
}
OF_CPUS = {
    # Counts for the experts' loop. On a GPU they stay where they are (tests/pool/test_no_syncs.py).
    "pool/counts.py (__post_init__): tolist",
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated zero 0": {"trunk_zero": 0, "pool_zero": 0},
    "colocated zero 1": {"trunk_zero": 1, "pool_zero": 1},
    "colocated zero 2": {"trunk_zero": 2, "pool_zero": 2},
    "colocated zero 3": {"trunk_zero": 3, "pool_zero": 1, "lanes": 2},
    "1+1": {"pool_ranks": 1, "lanes": 2},
    "1+1, muon, forced": {"pool_ranks": 1, "trunk_zero": 0, "pool_zero": 0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_reads_once(layout: str) -> None:
    """The trunk's only read ends its gradients; neither what comes before nor DeepSpeed's step waits for a device."""
    recipe = tiny(
        parallel=LAYOUTS[layout],
        router={"kind": "sigmoid_bias", "force": "balanced" if "forced" in layout else None},
        balance={"pool": 0.0, "layer": 0.01},
        train={"precision": "bf16", "optimizer": "muon" if "muon" in layout else "adamw"},
        model={"ffn_hidden": 24},
    )
    trunk, *pool = run_ranks(recipe.grid.world_size, reads_of_a_step, recipe)
    trunk = [read for read in trunk if not read.startswith("pool/wire")]  # the transport for CPUs
    assert trunk.count(THE_READ) == 1
    before = trunk[: trunk.index(THE_READ)]
    assert set(before) <= OF_CPUS
    assert set(trunk[len(before) + 1 :]) <= ON_THE_HOST
    norm = "trainer/train/pool_rank.py (accumulate): __float__"
    for reads in pool:
        assert reads.count(norm) == 1 and {r for r in reads if not r.startswith("pool/wire")} <= ON_THE_HOST | {norm}
