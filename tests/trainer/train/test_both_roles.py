"""A rank that is a trunk rank and holds a shard: what it contributes to the step's norm, and what it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import join, run_ranks
from tests.training import tiny, tokens
from trainer.config.recipe import Recipe
from trainer.planning.schedule import make_schedule


def one_step(recipe: Recipe) -> dict[str, Any]:
    """What a rank has to say about its first step."""
    from trainer.data.batches import SequenceStream
    from trainer.train.agreement import agreed_placement
    from trainer.train.loop import update
    from trainer.train.trunk_rank import TrunkRank

    job, data = join(recipe), tokens(recipe)
    placement = agreed_placement(job, recipe, None)
    stream = SequenceStream([data], None)
    role = TrunkRank(recipe, job, make_schedule(recipe), placement, stream, stream)
    share = role.accumulate(0)
    outcome = update(job, role, 0, share)
    assert outcome.scalars
    found = {"share": share, "norm": outcome.scalars.grad_norm, "load_M": role.load_LM.sum(0)}
    for family in role.metrics.collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            own = (labels.pop("role"), labels.pop("rank")) if "rank" in labels else None
            assert own in (None, ("trunk", str(job.rank)))
            found[" ".join((sample.name, *labels.values()))] = sample.value
    found["engines"] = list(role.engines)
    job.close()
    return found


def test_of_four_ranks_with_two_replicas_of_two_shards() -> None:
    parallel = {"layout": "every_rank", "trunk_ranks": 4, "expert_parallel": 2, "trunk_zero": 0, "pool_zero": 0}
    ranks = run_ranks(4, one_step, tiny(parallel=parallel))
    assert [rank["engines"] for rank in ranks] == [["trunk", f"pool/shard_{shard}"] for shard in (0, 1, 0, 1)]

    shares = [rank["share"] for rank in ranks]
    assert shares[2:] == [0.0, 0.0], "of replicas 1; the trunk is in that of rank 0"
    assert shares[0] > 0 and shares[1] > 0
    assert [rank["norm"] for rank in ranks] == [pytest.approx(sum(shares) ** 0.5)] * 4

    load_M = ranks[0]["load_M"]
    served_M = torch.zeros(8, dtype=torch.int64)
    for index, rank in enumerate(ranks):
        experts = range(4 * (index % 2), 4 * (index % 2 + 1))
        own = [int(rank[f"unipool_expert_tokens_total {expert}"]) for expert in experts]
        assert own == [rank[f"unipool_expert_gradients_total {expert}"] for expert in experts]
        assert rank["unipool_service_tokens_total"] == sum(own)
        served_M[list(experts)] += torch.tensor(own)
    assert served_M.equal(load_M)
    sent, received = (sum(rank[f"unipool_wire_{way}_bytes_total"] for rank in ranks) for way in ("sent", "received"))
    assert sent == received > 0
