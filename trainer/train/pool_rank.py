"""A pool rank: a shard of the experts, served to the trunk ranks."""

from __future__ import annotations

from typing import Any

import torch

from pool.placement import Placement
from pool.schedule import PoolSchedule
from pool.service import PoolService
from pool.shard import ExpertShard
from pool.wire import PoolWire, WireSettings
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.engine.role_engine import build_engine
from trainer.model.trunk import init_stds
from trainer.planning.schedule import ScheduleSpec
from trainer.telemetry.prometheus import ExpertLoad, MetricsServer
from trainer.telemetry.time_breakdown import UsageClock


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of products and of tokens on the wire."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def build_shard(recipe: Recipe, placement: Placement, shard: int, device: torch.device) -> ExpertShard:
    """A shard with its initial weights, on its device."""
    experts = ExpertShard(
        placement.experts_of(shard),
        recipe.model.hidden,
        recipe.model.ffn_hidden,
        compute_dtype(recipe),
        recipe.pool.recompute,
        recipe.pool.stash_bytes,
    )
    experts.reset_parameters(*init_stds(recipe), seed=recipe.run.seed)
    return experts.to(device)


def wire_settings(recipe: Recipe, job: Job, placement: Placement) -> WireSettings:
    """What both ends of the wire agree on."""
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


def reduce_expert_gradients(shard: ExpertShard, recipe: Recipe) -> None:
    """Flush the stash and scale the sums: the engine takes the mean over R replicas, wanted is the mean over T ranks.

    The trunk has scaled by 1 / micro-batches already, so the factor is R / T.
    """
    if shard.frozen:
        return
    shard.deferred_dw.drain()
    shard.scale_gradients(recipe.grid.replicas / recipe.grid.trunk_ranks)


class PoolRank:
    """Serves forwards, backwards and evaluations in the order of the plan, and steps with the trunk.

    Attributes:
        clock: what its training steps are spent on.
    """

    def __init__(self, recipe: Recipe, job: Job, schedule: ScheduleSpec, placement: Placement):
        self._recipe = recipe
        self.placement = placement
        self.plan = schedule.step
        index = job.topology.shard(job.rank)
        self._shard = build_shard(recipe, placement, index, job.device)
        self._engine = build_engine(self._shard, recipe, "pool", job.role_size)
        self.engines = {f"pool/shard_{index}": self._engine}
        self._wire = PoolWire(wire_settings(recipe, job, placement), job.host_group, job.lane_groups)
        self._service = PoolService(self._shard, self._wire, recipe.model.layers)
        self.clock = UsageClock(self._service)
        layers = recipe.model.layers if recipe.metrics.per_layer_experts else 0
        load = ExpertLoad(self._shard.expert_ids, recipe.pool.experts, layers)
        self.metrics = MetricsServer(recipe.metrics, "pool", job.rank, job.local_rank, load)

    def accumulate(self, step: int) -> float:
        """Serve one optimizer step up to its reduced gradients; returns the square of their norm."""
        self.clock.begin()
        with self._engine.accumulating():
            self._service.serve(self.plan.slots, step)
            reduce_expert_gradients(self._shard, self._recipe)
            self.clock.computed()
        return self._engine.grad_norm_squared()

    def step(self, step: int, total_norm: float) -> None:
        """Step with the norm over both roles."""
        self._engine.step(total_norm)
        self._shard.weights_changed()
        self.clock.stepped()
        self.metrics.served(self._service.take_served())
        self.metrics.used(self.clock.total, self._wire.bytes_sent, self._wire.bytes_received)

    def serve(self, plan: PoolSchedule, step: int) -> None:
        """Serve an evaluation or a generation."""
        self._service.serve(plan.slots, step)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a pool rank is its engine."""
        return {}

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Called after the engine has loaded."""
        self._shard.weights_changed()

    def recorded_load(self) -> None:
        """Trunk ranks know it."""
        return
