"""Numbers that are none: routers' logits, losses, and what is written and printed of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import join, run_ranks
from tests.training import tiny, tokens
from trainer.config import Recipe

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"trunk_zero": 1, "pool_zero": 1},
    "colocated zero 0": {"trunk_zero": 0, "pool_zero": 0},
    "1+1": {"pool_ranks": 1, "lanes": 2},
    "2+1": {"trunk_ranks": 2, "pool_ranks": 1, "trunk_zero": 2},
}


def broken_routers(recipe: Recipe) -> dict[str, Any] | None:
    """A step with infinite logits in the last layer of the last trunk rank, then an evaluation and a probe with them."""
    from trainer.data.batches import SequenceStream
    from trainer.pool_rank import PoolRank
    from trainer.train import agreed_placement, optimizer_step
    from trainer.trunk_rank import TrunkRank

    job, data = join(recipe), tokens(recipe)
    placement = agreed_placement(job, recipe, None)
    evaluation = job.schedule.evaluation(recipe.micro_batches)
    if not job.is_trunk:
        assert placement
        pool = PoolRank(recipe, job, placement)
        before = {name: p.clone() for name, p in pool.engines["pool/shard_0"].module.named_parameters()}
        assert optimizer_step(job, pool, 0) is None
        for name, parameter in pool.engines["pool/shard_0"].module.named_parameters():
            assert parameter.equal(before[name]), name
        for _ in range(2):
            pool.serve(evaluation, 1)
        job.close()
        return None
    role = TrunkRank(recipe, job, placement, SequenceStream(data, 0), SequenceStream(data, None))
    router = role.trunk.blocks[-1].router
    if job.rank == recipe.parallel.trunk_ranks - 1:
        router.forward = _infinite_first_token(router.forward)
    before = {name: value.clone() for name, value in role.trunk.state_dict().items()}
    scalars = optimizer_step(job, role, 0)
    assert scalars
    for name, value in role.trunk.state_dict().items():
        assert value.equal(before[name]), name
    found = {"loss": scalars.loss, "applied": scalars.applied, "tokens": scalars.nonfinite_router_tokens}
    found["val_loss"], _ = role.evaluate(1, 1)
    found["random_loss"], _ = role.evaluate(1, 1, random_layer=1)
    job.close()
    return found


def _infinite_first_token(forward: Any) -> Any:
    """A router whose first token has an infinite logit and whatever gradient that has."""

    def route(h_TD: torch.Tensor, *others: Any) -> Any:
        return forward(h_TD * torch.tensor([math.inf] + [1.0] * (len(h_TD) - 1))[:, None], *others)

    return route


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("norm", "colocated"),
        ("sigmoid_bias", "colocated zero 0"),
        ("softmax", "1+1"),
        ("sigmoid_bias", "1+1"),
        ("norm", "2+1"),
    ],
)
def test_a_step_with_infinite_router_logits_is_skipped_and_counted(kind: str, layout: str) -> None:
    balance = {} if kind == "norm" else {"pool": 0.0, "layer": 0.01}
    recipe = tiny(router={"kind": kind}, parallel=LAYOUTS[layout], balance=balance)
    ranks = run_ranks(recipe.grid.world_size, broken_routers, recipe)
    for found in ranks[: recipe.parallel.trunk_ranks]:
        assert not found["applied"]
        assert found["tokens"] == recipe.micro_batches  # one of each micro-batch of one rank
        assert all(math.isnan(found[name]) for name in ("loss", "val_loss", "random_loss")), found
