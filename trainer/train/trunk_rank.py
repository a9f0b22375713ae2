"""A trunk rank: runs its micro-batches through the trunk and the pool, of which it may hold a part itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pool.placement import Placement
from pool.schedule import WARM_UP_STEP, lockstep_schedule
from router import BiasedRouter, LoadStatistics, balance_coefficients, load_of_groups
from trainer.checkpoint.format import OwnershipRecord
from trainer.cluster.process_groups import Job
from trainer.config.lock import STAGES, locked_after
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.engine.monitors import Monitors
from trainer.engine.role_engine import build_engine, squared_norm
from trainer.model.lock import forced_reaches
from trainer.model.micro_batch import MicroBatchResult, Objective, PoolMap, train_dense_micro_batch, train_micro_batch
from trainer.model.pool_client import MicroBatch
from trainer.model.trunk import Trunk
from trainer.model.warm_up import warm_up
from trainer.planning.schedule import ScheduleSpec
from trainer.telemetry.console import say
from trainer.telemetry.prometheus import MetricsServer
from trainer.telemetry.step_scalars import StepScalars
from trainer.telemetry.time_breakdown import UsageClock
from trainer.train.ends.early_stop import early_stop
from trainer.train.evaluation.held_out import HeldOut, sequences, to_device
from trainer.train.lock import RunLock
from trainer.train.norm_guard import guarded_norms, restore_norms
from trainer.train.pool_side import PoolSide
from trainer.train.step_results import StepResults, lock_scalars, over_all_experts, reduce_results, step_scalars

LOAD_STEPS = 100
"""Number of recent steps over which the recorded load is averaged, roughly."""


def _pool_map(recipe: Recipe, placement: Placement, device: torch.device) -> PoolMap:
    position_M = placement.position_M.to(device)
    sharing = recipe.model.layers // recipe.model.groups
    return PoolMap(position_M, recipe.experts_per_layer, sharing, forced_reaches(recipe, device))


class TrunkRank:
    """Computes attention, routers and head, requests the experts from the pool, and serves its shard, if it has one.

    Args:
        document_end: See `Trunk`.
        metrics: Where the rank serves its numbers; without it nowhere.

    Attributes:
        schedule, plan: What all ranks do; what this one does in an optimizer step.
        clock: Measures what its training steps are spent on.
        lock: Which experts the layers own; None in a run without a lock.
        norms: Gradient norms of the last steps, by which steps are skipped; None if none are.
        early_stop: What may end the run before its last step; None if nothing may.
        load_LM: Assignments of the last step by layer and the experts that it sees, over all trunk ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        schedule: ScheduleSpec,
        placement: Placement | None,
        training: SequenceStream,
        validation: SequenceStream,
        document_end: int | None = None,
        metrics: MetricsServer | None = None,
    ):
        self._recipe, self._job, self.schedule = recipe, job, schedule
        self.placement = placement
        served = job.topology.served_trunk_ranks(job.rank) if job.topology.every_rank else ()
        self.plan = schedule.step.for_trunk_ranks(served)
        self._training = training
        self.trunk = Trunk(recipe, job.device, document_end).requires_grad_(recipe.train.freeze != "trunk")
        self._pool_map = _pool_map(recipe, placement, job.device) if placement else None
        self.lock = RunLock(recipe, job.device) if recipe.lock else None
        self.early_stop = early_stop(recipe.eval)
        self.norms = guarded_norms(recipe)
        self._compile()
        trunk_engine = build_engine(self.trunk, recipe, "trunk", job.role_size)
        self._pool_side = PoolSide(recipe, job, placement)
        self._pool = self._pool_side.client
        self._held_out = HeldOut(recipe, job, schedule, self.trunk, self._pool, validation)
        self.engines = {"trunk": trunk_engine, **self._pool_side.engines}
        self.metrics = metrics or MetricsServer("trunk", job.rank)
        self.metrics.expert_load = self._pool_side.expert_load()
        self.clock = UsageClock(self._pool.waits, self._pool_side.serving)
        layers, experts = recipe.model.layers, max(1, recipe.experts_per_layer)
        self._statistics = LoadStatistics(recipe.balance.scope, recipe.balance.delay, layers, experts)
        self.load_LM = torch.zeros(layers, experts, dtype=torch.int64)
        self._recent_load_LM = torch.zeros_like(self.load_LM, dtype=torch.float64)
        self._results = StepResults({}, [], 0, self.load_LM, [], [])
        self._started = self._waited = 0.0

    def _compile(self) -> None:
        """Compile the segments. Some trunk ranks may take longer than the collectives of an engine would wait."""
        recipe, job = self._recipe, self._job
        if self.trunk.compiled:
            warm_up(self.trunk, self._pool_map, recipe)
            job.shared.put("compiled", "")
            for rank in range(job.role_size):
                job.shared.get(f"compiled/{rank}")
        elif job.rank == 0 and job.device.type == "cuda" and recipe.train.compile is None:
            say("unipool: the trunk is not compiled (train.compile), because parallel.trunk_zero is 3")

    def warm_up(self, limit: timedelta) -> None:
        """Run a micro-batch forward and backward, with the pool, and leave nothing behind.

        What takes long the first time, such as compiling kernels, then does not happen in a step, where waits are
        shorter. The gradients go as those of a step that is skipped. All ranks call this together.

        Args:
            limit: Longest wait for a message meanwhile.
        """
        recipe, rank = self._recipe, self._job.rank
        pool_map, grid = self._map_at(0), recipe.grid
        assert pool_map is not None
        plan = lockstep_schedule(grid.trunk_ranks, 1, recipe.model.layers, grid.every_rank)
        objective = Objective(1.0, lambda load_LM: 0.0 * load_LM, recipe.router.z_loss, recipe.train.recompute)
        sequences_BS1 = next(sequences(self._training, recipe, self._job, 0))
        self._pool_side.limit(limit)
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.accumulating())
            micro_batch = train_micro_batch(self.trunk, pool_map, sequences_BS1, 0, objective)
            self._pool.run([micro_batch], plan.lane_order[rank], WARM_UP_STEP, plan.slots)
            self._job.barrier()  # some ranks may have compiled for longer than a reduction waits
            self._pool_side.reduce_gradients()
        for engine in self.engines.values():
            engine.grad_norm()
            engine.step(math.inf)
        self._pool_side.weights_changed()
        if self._pool_side.service:
            self._pool_side.service.take_served()
        self._pool_side.limit()

    def accumulate(self, step: int) -> float:
        """Run forward and backward of this rank's share of the global batch.

        Returns:
            What this rank contributes to the squared norm of the reduced gradients: that of the trunk from rank 0, that
            of its shard from the shard's replica 0. Infinite if a router had logits that are not finite.
        """
        self._started = time.perf_counter()
        self._waited = self._pool.waits.seconds_waiting
        self.clock.begin()
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.accumulating())
            order = self.plan.lane_order[self._job.rank]
            results = self._pool.run(self._micro_batches(step), order, step, self.plan.slots)
            self._pool_side.reduce_gradients()
            self.clock.computed()
            self._job.reducing()
        norms = [engine.grad_norm() for engine in self.engines.values()]
        self._results = reduce_results(results, norms, self._job)
        self.load_LM = self._results.load_LM
        # Gradients may be finite nevertheless, as those of a sigmoid at infinity are; the step is skipped all the same.
        if self._results.nonfinite_router_tokens:
            return math.inf
        first = (self._job.rank == 0, self._pool_side.replica == 0)  # all ranks of an engine's group know its norm
        return sum(map(squared_norm, compress(self._results.norms, first)))

    def _map_at(self, step: int) -> PoolMap | None:
        """Return where the experts are, and which of them the layers reach in `step`."""
        if self._pool_map is None or self.lock is None:
            return self._pool_map
        return replace(self._pool_map, reaches=self.lock.reaches.at(step))

    def _micro_batches(self, step: int) -> Iterator[MicroBatch[MicroBatchResult]]:
        pool_map = self._map_at(step)
        for index, sequences_BS1 in enumerate(sequences(self._training, self._recipe, self._job, step)):
            objective = self._objective(step, index)
            if pool_map is None:
                yield train_dense_micro_batch(self.trunk, sequences_BS1, objective)
            else:
                yield train_micro_batch(self.trunk, pool_map, sequences_BS1, index, objective)

    def _objective(self, step: int, index: int) -> Objective:
        """Return what micro-batch `index` of `step` minimises, with the balance losses that the recipe asks for."""
        recipe = self._recipe
        number = step * recipe.micro_batches + index

        def coefficients(load_LM: Tensor) -> Tensor | None:
            self._statistics.record_micro_batch(number, load_LM)
            fractions_LM = self._statistics.fractions(number, step)
            if fractions_LM is None:
                return None
            return balance_coefficients(fractions_LM, recipe.balance.layer, recipe.balance.pool, recipe.model.groups)

        entropy = self.lock.entropy(step) if self.lock else None
        return Objective(1 / recipe.micro_batches, coefficients, recipe.router.z_loss, recipe.train.recompute, entropy)

    def step(self, step: int, total_norm: float, skip: bool = False) -> StepScalars:
        """Update the weights unless `skip`, clipping by the norm over both roles; return the step's scalars."""
        lr = self.engines["trunk"].learning_rate
        outcomes = [engine.step(math.inf if skip else total_norm) for engine in self.engines.values()]
        self._pool_side.weights_changed()
        scalars = step_scalars(
            self._recipe,
            self.placement,
            self._results,
            grad_norm=total_norm,
            lr=lr,
            seconds=time.perf_counter() - self._started,
            seconds_waiting=self._pool.waits.seconds_waiting - self._waited,
            applied=all(outcomes),
            lock=lock_scalars(self._recipe, step, self.load_LM, self.lock.reaches.owners_M) if self.lock else {},
        )
        if self._pool_map is not None:
            load_LM = to_device(self.load_LM, self._job.device)
            self._statistics.record_step(step, load_LM)
            if not self._results.nonfinite_router_tokens:  # such tokens are sent to arbitrary experts
                first = locked_after(self._recipe) if scalars.lock_stage == STAGES.index("locked") else 0
                self._recent_load_LM.lerp_(self.load_LM.double(), 1 / min(step + 1 - first, LOAD_STEPS))
            if scalars.applied and self._recipe.train.freeze != "trunk":
                self._move_expert_bias(load_LM)
        self.clock.stepped()
        self._serve_metrics(scalars, step + 1)
        return scalars

    def _move_expert_bias(self, load_LM: Tensor) -> None:
        if self._recipe.router.kind == "norm_bias":
            load_LM = load_of_groups(load_LM, self._recipe.model.groups)
        for load_M, block in zip(load_LM, self.trunk.blocks, strict=True):
            if isinstance(block.router, BiasedRouter):
                block.router.update_bias(load_M, self._recipe.router.bias_rate)

    def _serve_metrics(self, scalars: StepScalars, done: int) -> None:
        metrics = self.metrics
        metrics.used(self.clock.total.plus(self.clock.served), self._pool.bytes_sent, self._pool.bytes_received)
        metrics.trained(scalars.tokens // self._job.role_size, scalars.pool_wait)
        if self._job.rank == 0:
            metrics.step(scalars, done, has_pool=self._pool_map is not None)
        if self._pool_side.service:
            metrics.served(self._pool_side.service.take_served())
        elif metrics.expert_load:
            load_LM = over_all_experts(self.load_LM, self._recipe.model.groups).numpy()
            metrics.count_load(load_LM, load_LM.sum(0))

    def losses_by_rows(self, step: int) -> list[tuple[float, str]]:
        """Return the loss of each of this rank's micro-batches of the last step, and its rows of the data."""
        recipe, job = self._recipe, self._job
        places = self._training.places(
            step, recipe.train.global_batch, job.rank, job.role_size, recipe.train.micro_batch
        )
        named = (f"rows {', '.join(map(self._training.name, rows))}" for rows in places)
        return list(zip(self._results.own_losses, named, strict=True))

    def nonfinite_rows(self, step: int) -> str:
        """Name this rank's micro-batches of the last step whose loss is not finite, and their rows of the data."""
        found = [
            f"micro-batch {index} has loss {loss} ({rows})"
            for index, (loss, rows) in enumerate(self.losses_by_rows(step))
            if not math.isfinite(loss)
        ]
        return f"{self._job.name}: {', '.join(found)}" if found else ""

    def evaluate(self, batches: int, step: int, random_layer: int | None = None) -> tuple[float, Tensor]:
        """See `HeldOut.evaluate`; the same on every trunk rank."""
        return self._held_out.evaluate(batches, step, self._map_at(step), random_layer)

    def generate(self, prompt: list[int], tokens: int, step: int, temperature: float = 0.8) -> list[int] | None:
        """See `HeldOut.generate`; the same on every trunk rank."""
        return self._held_out.generate(prompt, tokens, step, self._map_at(step), temperature)

    @property
    def monitors(self) -> Monitors:
        """DeepSpeed's monitors."""
        return self.engines["trunk"].monitors

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state that the engines do not hold. No step draws from torch's generator."""
        return {
            "statistics": self._statistics.state_dict(),
            "recent_load_LM": self._recent_load_LM.clone(),
            **({"lock": self.lock.state_dict()} if self.lock else {}),
            **({"norms": list(self.norms.values)} if self.norms else {}),
            **({"early_stop": self.early_stop.state_dict()} if self.early_stop else {}),
        }

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Restore what `state_dict` returned, after the engines have loaded.

        Args:
            steps: Optimizer steps done.
            shift: What to add to the micro-batches' numbers at the time of the save to get those of now.
        """
        saved = state["statistics"]
        by_step = self._statistics.scope == "global_batch"
        if (saved["scope"], saved["delay"]) == (self._statistics.scope, self._statistics.delay):
            self._statistics.load_state_dict(saved, 0 if by_step else shift)
        else:
            self._statistics.begin_at(steps if by_step else steps * self._recipe.micro_batches)
        self._recent_load_LM = state["recent_load_LM"].cpu()
        if self.lock and "lock" in state:
            self.lock.restore(state["lock"])
        restore_norms(self.norms, state)
        if self.early_stop and "early_stop" in state:
            self.early_stop.restore(state["early_stop"])
        self._pool_side.weights_changed()

    @property
    def ownership(self) -> OwnershipRecord | None:
        """The experts of each layer, in a run with a lock after the assignment."""
        return self.lock.record if self.lock else None

    def recorded_load(self) -> NDArray[np.int64] | None:
        """Return the assignments per step by layer and global expert (L, M), averaged over recent steps."""
        if self._pool_map is None:
            return None
        return over_all_experts(self._recent_load_LM.round(), self._recipe.model.groups).long().numpy()

    def move_to(self, placement: Placement) -> None:
        """See `trainer.checkpoint.format.Role.move_to`."""
        self.placement = placement
        self._pool_map = _pool_map(self._recipe, placement, self._job.device)
        self._pool_side.move_to(placement)
        self.metrics.expert_load = self._pool_side.expert_load()

    def weights_changed(self) -> None:
        """See `trainer.checkpoint.format.Role.weights_changed`."""
        self._pool_side.weights_changed()
