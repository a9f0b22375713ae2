"""A pool rank: a shard of the experts, served to the trunk ranks."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from pool.placement import Placement
from pool.schedule import WARM_UP_STEP, lockstep_schedule
from pool.service import PoolService
from pool.wire import pool_wire
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.engine.experts import build_shard, load_of, reduce_expert_gradients, wire_settings
from trainer.engine.role_engine import build_engine, squared_norm
from trainer.planning.schedule import ScheduleSpec
from trainer.telemetry.prometheus import MetricsServer
from trainer.telemetry.time_breakdown import UsageClock
from trainer.train.ends.early_stop import EarlyStop
from trainer.train.lock import RunLock
from trainer.train.norm_guard import guarded_norms, restore_norms


class PoolRank:
    """Serves forwards, backwards and evaluations in the order of the schedule, and steps with the trunk.

    Args:
        metrics: Where the rank serves its numbers; without it nowhere.

    Attributes:
        schedule, plan: What all ranks do; what this one does in an optimizer step.
        clock: Measures what its training steps are spent on.
        norms: See `TrunkRank`; the same on all ranks.
        lock, ownership: None: only trunk ranks know which layer owns which expert.
        early_stop: None: only trunk ranks know the validation loss.
    """

    lock: RunLock | None = None
    ownership: None = None
    early_stop: EarlyStop | None = None

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        schedule: ScheduleSpec,
        placement: Placement,
        metrics: MetricsServer | None = None,
    ):
        self._recipe, self._job, self.schedule = recipe, job, schedule
        self.placement = placement
        self.plan = schedule.step.for_trunk_ranks(job.topology.served_trunk_ranks(job.rank))
        index = job.topology.shard(job.rank)
        self._shard = build_shard(recipe, placement, index, job.device)
        self._engine = build_engine(self._shard, recipe, "pool", job.role_size)
        self.engines = {f"pool/shard_{index}": self._engine}
        self._wire = pool_wire(wire_settings(recipe, job, placement), job.wire_groups)
        self._service = PoolService(self._shard, self._wire, recipe.model.layers)
        self.norms = guarded_norms(recipe)
        self.clock = UsageClock(self._service.waits)
        self.metrics = metrics or MetricsServer("pool", job.rank)
        self.metrics.expert_load = load_of(self._shard, recipe)

    def warm_up(self, limit: timedelta) -> None:
        """See `TrunkRank.warm_up`: serve its requests."""
        schedule = lockstep_schedule(self._recipe.grid.trunk_ranks, 1, self._recipe.model.layers)
        self._wire.limit = limit
        with self._engine.accumulating():
            self._service.serve(schedule.slots, WARM_UP_STEP)
            self._job.barrier()  # see `TrunkRank.warm_up`
            reduce_expert_gradients(self._shard, self._recipe)
        self._engine.grad_norm()
        self._wire.settle()
        self._engine.step(math.inf)
        self.weights_changed()
        self._service.take_served()
        self._wire.limit = self._wire.settings.timeout

    def accumulate(self, step: int) -> float:
        """Serve an optimizer step up to its reduced gradients.

        Returns:
            The square of their norm from the shard's replica 0, and 0 from the others, which know the same one.
        """
        self.clock.begin()
        with self._engine.accumulating():
            self._service.serve(self.plan.slots, step)
            reduce_expert_gradients(self._shard, self._recipe)
            self.clock.computed()
            self._job.reducing()
        norm = float(self._engine.grad_norm())
        self._wire.settle()
        return 0.0 if self._job.role_rank else squared_norm(norm)

    def step(self, step: int, total_norm: float, skip: bool = False) -> None:
        """Update the weights unless `skip`, clipping by the norm over both roles."""
        self._engine.step(math.inf if skip else total_norm)
        self.weights_changed()
        self.clock.stepped()
        self.metrics.served(self._service.take_served())
        self.metrics.used(self.clock.total, self._wire.bytes_sent, self._wire.bytes_received)

    def evaluate(self, batches: int, step: int, random_layer: int | None = None) -> tuple[float, None]:
        """Serve the trunk ranks' evaluation of `batches` global batches. A pool rank knows neither loss nor load."""
        self._service.serve(self.schedule.evaluation(batches * self._recipe.micro_batches).slots, step)
        self._wire.settle()
        self._job.reducing()
        return math.nan, None

    def generate(self, tokens: int, step: int) -> None:
        """Serve the trunk ranks' generation of `tokens` tokens."""
        self._service.serve(self.schedule.generation(tokens).slots, step)
        self._wire.settle()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the engine holds all the state of a pool rank."""
        return {}

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Use the weights that the engine has loaded; see `load_checkpoint` for the state."""
        restore_norms(self.norms, state)
        self.weights_changed()

    def recorded_load(self) -> None:
        """Return nothing: only trunk ranks know the load of each layer."""
        return

    def move_to(self, placement: Placement) -> None:
        """See `trainer.checkpoint.format.Role.move_to`."""
        self.placement = placement
        self._shard.expert_ids = placement.experts_of(self._job.topology.shard(self._job.rank))
        self.metrics.expert_load = load_of(self._shard, self._recipe)

    def weights_changed(self) -> None:
        """See `trainer.checkpoint.format.Role.weights_changed`."""
        self._shard.weights_changed()
