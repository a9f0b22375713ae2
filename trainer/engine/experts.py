"""The experts of a pool rank, or of a trunk rank in the colocated layout: a shard, its wire, and its gradients."""

from __future__ import annotations

import torch

from pool.placement import Placement
from pool.shard import ExpertShard
from pool.wire import WireSettings
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.model.trunk import compute_dtype, init_stds
from trainer.telemetry.prometheus import ExpertLoad


def build_shard(recipe: Recipe, placement: Placement, shard: int, device: torch.device) -> ExpertShard:
    """Return a shard with its initial weights, on its device."""
    experts = ExpertShard(
        placement.experts_of(shard),
        recipe.model.hidden,
        recipe.model.ffn_hidden,
        compute_dtype(recipe),
        recipe.pool.recompute,
        recipe.stash_limit,
    )
    experts.reset_parameters(*init_stds(recipe), seed=recipe.run.seed)
    return experts.to(device)


def wire_settings(recipe: Recipe, job: Job, placement: Placement) -> WireSettings:
    """Return what both ends of the wire must agree on."""
    return WireSettings(
        topology=job.topology,
        rank=job.rank,
        num_local_experts=placement.num_local_experts,
        hidden=recipe.model.hidden,
        dtype=compute_dtype(recipe),
        device=job.device,
        payload_device=job.payload_device,
        timeout=job.timeout,
        check=recipe.parallel.check,
    )


def load_of(shard: ExpertShard, recipe: Recipe) -> ExpertLoad:
    """Return the load to serve as metrics by a rank that serves a shard to others."""
    layers = recipe.model.layers if recipe.metrics.per_layer_experts else 0
    return ExpertLoad(shard.expert_ids, recipe.pool.experts, layers)


def reduce_expert_gradients(shard: ExpertShard, recipe: Recipe) -> None:
    """Complete the weights' gradients, scaled so that the engine's reduction gives the mean over the trunk ranks.

    The trunk has scaled them by 1 / micro-batches already. The engine takes the mean over R replicas of sums over T
    trunk ranks, hence the factor R / T.
    """
    if not shard.frozen:
        shard.deferred_dw.drain()
        factor = recipe.grid.replicas / recipe.grid.trunk_ranks
        if factor != 1:
            shard.scale_gradients(factor)
