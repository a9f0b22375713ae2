"""The shard that a recipe asks for."""

from __future__ import annotations

import torch

from pool.counts import Counts
from pool.placement import Placement
from tests.training import tiny
from trainer.engine.experts import build_shard
from trainer.model.trunk import init_stds


def test_a_shard_is_as_the_recipe_says() -> None:
    recipe = tiny(
        pool={"experts": 4, "recompute": True, "stash_bytes": 1}, train={"precision": "bf16"}, model={"ffn_hidden": 24}
    )
    shard = build_shard(recipe, Placement((3, 0, 1, 2), 2), 0, torch.device("cpu"))
    assert shard.expert_ids == (3, 0) and shard.recompute and shard.compute_dtype == torch.bfloat16
    std, output_std = init_stds(recipe)
    assert abs(shard.w13_e2FD.std() / std - 1) < 0.1 and abs(shard.w2_eDF.std() / output_std - 1) < 0.1
    rows_ND = torch.ones(2, recipe.model.hidden, dtype=torch.bfloat16)
    shard.backward_rows(rows_ND, None, rows_ND, [Counts.of([1, 1])])
    shard.deferred_dw.drain_if_full()
    assert shard.w2_eDF.grad is not None, "one byte is less than this"
