"""A trunk rank: drives its micro-batches through the trunk and the pool. Colocated, it holds the whole pool too."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pool.placement import Placement
from pool.shard import ExpertShard
from pool.wire import TrunkWire
from router import (
    LoadStatistics,
    balance_coefficients,
    dead_experts,
    effective_experts,
    load_imbalance,
    specialisation,
)
from router.routers import SigmoidBiasRouter
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.data.batches import SequenceStream
from trainer.engine.monitors import Monitors
from trainer.engine.role_engine import build_engine
from trainer.model.micro_batch import (
    MicroBatchResult,
    Objective,
    PoolMap,
    Reroute,
    hidden_states,
    train_dense_micro_batch,
    train_micro_batch,
)
from trainer.model.pool_client import LocalPool, MicroBatch, NoPool, PoolClient, RemotePool
from trainer.model.random_routing import random_routing
from trainer.model.trunk import Trunk
from trainer.planning.schedule import ScheduleSpec
from trainer.telemetry.prometheus import ExpertLoad, MetricsServer, StepScalars
from trainer.telemetry.time_breakdown import UsageClock
from trainer.train.pool_rank import build_shard, reduce_expert_gradients, wire_settings

LOAD_STEPS = 100
"""Steps over which the recorded load is a mean, about."""


class TrunkRank:
    """Computes attention and routers, asks the pool for the experts, and knows the step's scalars.

    Args:
        document_end: see `Trunk`.
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
    ):
        self._recipe = recipe
        self._job = job
        self.placement = placement
        self._training, self._validation = training, validation
        self.trunk = Trunk(recipe, job.device, document_end)
        self.engines = {"trunk": build_engine(self.trunk, recipe, "trunk", job.role_size)}
        self._statistics = LoadStatistics(
            recipe.balance.scope, recipe.balance.delay, recipe.model.layers, max(1, recipe.experts_per_layer)
        )
        self._shard: ExpertShard | None = None
        self._schedule = schedule
        self.plan = schedule.step
        self._pool: PoolClient = NoPool()
        self._pool_map: PoolMap | None = None
        if placement:
            self._join_pool(placement)
        self.metrics = MetricsServer(recipe.metrics, "trunk", job.rank, job.local_rank, self._known_load())
        self.load_LM = torch.zeros(recipe.model.layers, max(1, recipe.experts_per_layer), dtype=torch.int64)
        self._recent_load_LM = torch.zeros_like(self.load_LM, dtype=torch.float64)
        self._scalars = [0.0, 0.0, 0.0, 0.0]
        self._nonfinite_router_tokens = 0
        self._gates = [0.0] * recipe.model.layers
        self._losses: list[float] = []
        self.clock = UsageClock(self._pool)
        self._started = time.perf_counter()
        self._waited = 0.0

    def _known_load(self) -> ExpertLoad | None:
        """The load of all experts where there is no pool rank to serve it as metrics."""
        recipe = self._recipe
        if self._shard is None or self._job.rank:
            return None
        layers = recipe.model.layers if recipe.metrics.per_layer_experts else 0
        return ExpertLoad(range(recipe.pool.experts), recipe.pool.experts, layers, backward=False)

    def _join_pool(self, placement: Placement) -> None:
        recipe, job = self._recipe, self._job
        self._pool_map = PoolMap(
            placement.position_M.to(job.device), recipe.experts_per_layer, recipe.model.layers // recipe.model.groups
        )
        if job.topology.colocated:
            self._shard = build_shard(recipe, placement, 0, job.device)
            self.engines["pool/shard_0"] = build_engine(self._shard, recipe, "pool", job.role_size)
            self._pool = LocalPool(self._shard)
        else:
            wire = TrunkWire(wire_settings(recipe, job, placement), job.host_group, job.lane_groups)
            self._pool = RemotePool(wire, job.rank)

    def accumulate(self, step: int) -> float:
        """Forward and backward of this rank's share of the global batch; returns the squared norm of the gradients."""
        self._started = time.perf_counter()
        self._waited = self._pool.seconds_waiting
        self.clock.begin()
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.accumulating())
            results = self._pool.run(self._micro_batches(step), self.plan.lane_order[self._job.rank], step)
            if self._shard is not None:
                reduce_expert_gradients(self._shard, self._recipe)
            self.clock.computed()
        self._gather(results)
        squared_norm = sum(engine.grad_norm_squared() for engine in self.engines.values())
        # Gradients may happen to be finite all the same, as those of a sigmoid at infinity are: skipped as well.
        return math.inf if self._nonfinite_router_tokens else squared_norm

    def _micro_batches(self, step: int) -> Iterator[MicroBatch[MicroBatchResult]]:
        for index, sequences_BS1 in enumerate(self._sequences(self._training, step)):
            objective = self._objective(step, index)
            if self._pool_map is None:
                yield train_dense_micro_batch(self.trunk, sequences_BS1, objective)
            else:
                yield train_micro_batch(self.trunk, self._pool_map, sequences_BS1, index, objective)

    def _sequences(self, stream: SequenceStream, step: int) -> Iterator[Tensor]:
        """This rank's micro-batches of a global batch, on the device."""
        recipe, ranks = self._recipe, self._job.topology.trunk_ranks
        for sequences_BS1 in stream.micro_batches(
            step, recipe.train.global_batch, self._job.rank, ranks, recipe.train.micro_batch
        ):
            yield sequences_BS1.to(self._job.device)

    def _objective(self, step: int, index: int) -> Objective:
        """What micro-batch `index` of `step` minimises; balance losses need the load that the recipe asks for."""
        recipe = self._recipe
        number = step * recipe.micro_batches + index

        def coefficients(load_LM: Tensor) -> Tensor | None:
            self._statistics.record_micro_batch(number, load_LM)
            fractions_LM = self._statistics.fractions(number, step)
            if fractions_LM is None:
                return None
            b = recipe.balance
            return balance_coefficients(fractions_LM, b.layer, b.pool, recipe.model.groups)

        return Objective(1 / recipe.micro_batches, coefficients, recipe.router.z_loss, recipe.train.recompute)

    def _gather(self, results: list[MicroBatchResult]) -> None:
        """The step's scalars and load over all trunk ranks: one reduction."""
        ranks = self._job.topology.trunk_ranks
        self._losses = []
        scalars = torch.zeros(4 + len(self._gates), dtype=torch.float64)
        broken = torch.zeros(1, dtype=torch.float64)
        load_LM = torch.zeros_like(self.load_LM)
        for r in results:
            tokens = r.nonfinite_router_tokens.to(r.loss.dtype)
            of_all = torch.stack((tokens, r.loss, r.balance_loss, r.z_loss, r.distinct_experts))
            own = torch.cat((of_all, r.gates_L)).double().cpu()
            self._losses.append(float(own[1]))
            broken += own[0]
            scalars += own[1:]
            load_LM += r.tokens_per_expert_LM.cpu()
        together = torch.cat((broken, scalars / (len(results) * ranks), load_LM.double().flatten()))
        if ranks > 1:
            dist.all_reduce(together)
        broken, scalars, load = together.split((1, len(scalars), load_LM.numel()))
        self._nonfinite_router_tokens = int(broken)
        self._scalars, self._gates = scalars[:4].tolist(), scalars[4:].tolist()
        self.load_LM = load.long().view_as(load_LM)

    def step(self, step: int, total_norm: float) -> StepScalars:
        """Step with the norm over both roles; returns the step's scalars."""
        recipe = self._recipe
        lr = self.engines["trunk"].learning_rate
        outcomes = [engine.step(total_norm) for engine in self.engines.values()]
        if self._shard is not None:
            self._shard.weights_changed()
        scalars = self._step_scalars(total_norm, lr, all(outcomes))
        if recipe.model.ffn == "pool":
            self._statistics.record_step(step, self.load_LM.to(self._job.device))
            if not self._nonfinite_router_tokens:  # whose experts nobody chose
                self._recent_load_LM.lerp_(self.load_LM.double(), 1 / min(step + 1, LOAD_STEPS))
            if scalars.applied:
                self._move_expert_bias()
        self.clock.stepped()
        self._serve_metrics(scalars, step + 1)
        return scalars

    def _serve_metrics(self, scalars: StepScalars, done: int) -> None:
        metrics, has_pool = self.metrics, self._pool_map is not None
        metrics.used(self.clock.total, self._pool.bytes_sent, self._pool.bytes_received)
        metrics.trained(scalars.tokens // self._job.topology.trunk_ranks, scalars.pool_wait)
        if self._job.rank == 0:
            metrics.step(scalars, done, has_pool)
        if metrics.expert_load:
            load_LM = self._over_all_experts(self.load_LM)
            metrics.count_load(load_LM, load_LM.sum(0))

    def nonfinite_rows(self, step: int) -> str:
        """This rank's micro-batches of the step just done whose loss is not finite, and their rows of the data."""
        recipe, job = self._recipe, self._job
        places = self._training.places(
            step, recipe.train.global_batch, job.rank, recipe.parallel.trunk_ranks, recipe.train.micro_batch
        )
        found = [
            f"micro-batch {index} has loss {loss} (rows {', '.join(map(self._training.name, rows))})"
            for index, (loss, rows) in enumerate(zip(self._losses, places, strict=True))
            if not math.isfinite(loss)
        ]
        return f"{job.name}: {', '.join(found)}" if found else ""

    def _move_expert_bias(self) -> None:
        for load_M, block in zip(self.load_LM, self.trunk.blocks, strict=True):
            if isinstance(block.router, SigmoidBiasRouter) and self._recipe.train.freeze != "trunk":
                block.router.update_bias(load_M.to(self._job.device), self._recipe.router.bias_rate)

    def pool_load(self) -> Tensor:
        """Assignments of the last step by global expert id, (M,) int64, over all trunk ranks."""
        groups = self._recipe.model.groups
        return self.load_LM.unflatten(0, (groups, -1)).sum(1).flatten()  # type: ignore[no-any-return]

    def _shard_load(self, load_M: Tensor) -> Tensor:
        """Of the last step, by shard."""
        if self.placement is None:
            return load_M
        in_shards_se = load_M[torch.tensor(self.placement.order)].view(self.placement.shards, -1)
        return in_shards_se.sum(1)

    def _specialisation(self) -> float:
        return specialisation(torch.from_numpy(self._over_all_experts(self.load_LM))) if self._pool_map else 0.0

    def _step_scalars(self, total_norm: float, lr: float, applied: bool) -> StepScalars:
        recipe = self._recipe
        seconds = time.perf_counter() - self._started
        tokens = recipe.train.global_batch * recipe.model.seq_len
        waited = self._pool.seconds_waiting - self._waited
        load_M = self.pool_load()
        loss, balance_loss, z_loss, distinct_experts = self._scalars
        layer_imbalance_L = load_imbalance(self.load_LM)
        return StepScalars(
            loss=loss,
            balance_loss=balance_loss,
            z_loss=z_loss,
            grad_norm=total_norm,
            lr=lr,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            load_imbalance=float(load_imbalance(load_M)),
            shard_imbalance=float(load_imbalance(self._shard_load(load_M))),
            layer_imbalance=float(layer_imbalance_L.mean()),
            layer_imbalances=tuple(layer_imbalance_L.tolist()),
            layer_gate=fmean(self._gates),
            smallest_gate=min(self._gates),
            layer_gates=tuple(self._gates),
            dead_experts=int(dead_experts(load_M)) if recipe.model.ffn == "pool" else 0,
            effective_experts=float(effective_experts(load_M)),
            distinct_experts=distinct_experts,
            specialisation=self._specialisation(),
            nonfinite_router_tokens=self._nonfinite_router_tokens,
            pool_wait=waited / seconds,
            applied=applied,
        )

    @torch.no_grad()
    def evaluate(self, batches: int, step: int, random_layer: int | None = None) -> tuple[float, Tensor]:
        """Mean cross-entropy in nats over `batches` global batches of held-out text, and the load they make (L, M).

        Args:
            random_layer: a layer that has random experts instead of those that its router chooses.
        """
        ranks = self._job.topology.trunk_ranks
        plan = self._schedule.evaluation(batches * self._recipe.micro_batches)
        micro_batches = self._held_out(batches, random_layer)
        results = self._pool.run(micro_batches, plan.lane_order[self._job.rank], step)
        total = torch.stack([loss.double().cpu() for loss, _ in results]).sum()
        held_out_LM = torch.zeros_like(self.load_LM)
        for _, load_LM in results:
            if load_LM is not None:
                held_out_LM += load_LM.cpu()
        if ranks > 1:
            dist.all_reduce(total)
            dist.all_reduce(held_out_LM)
        return float(total) / (len(results) * ranks), held_out_LM

    def _held_out(self, batches: int, random_layer: int | None) -> Iterator[MicroBatch[tuple[Tensor, Tensor | None]]]:
        recipe, index = self._recipe, 0
        share = recipe.train.global_batch // self._job.topology.trunk_ranks
        for batch in range(batches):
            first = batch * recipe.train.global_batch + self._job.rank * share
            for sequences_BS1 in self._sequences(self._validation, batch):
                reroute = None
                if random_layer is not None:
                    numbers = range(first, first + len(sequences_BS1))
                    reroute = random_routing(random_layer, recipe.experts_per_layer, recipe.run.seed, numbers)
                yield self._evaluate_micro_batch(sequences_BS1, index, reroute)
                first, index = first + len(sequences_BS1), index + 1

    def _evaluate_micro_batch(
        self, sequences_BS1: Tensor, index: int, reroute: Reroute | None
    ) -> MicroBatch[tuple[Tensor, Tensor | None]]:
        h_BSD, load_LM = yield from hidden_states(self.trunk, self._pool_map, sequences_BS1[:, :-1], index, reroute)
        with self.trunk.autocast():
            return self.trunk.loss(h_BSD, sequences_BS1[:, 1:]), load_LM

    @torch.no_grad()
    def generate(self, prompt: list[int], tokens: int, step: int, temperature: float = 0.8) -> list[int] | None:
        """Continue `prompt` by `tokens` sampled tokens; the same on every trunk rank.

        Returns None where the logits are not finite, after as many requests to the pool, which expects them.
        """
        generator = torch.Generator().manual_seed(self._recipe.run.seed)
        lane_order = self._schedule.generation(tokens).lane_order[self._job.rank]
        ids, sound = list(prompt), True
        for index in range(tokens):
            context_1S = torch.tensor([ids[-self._recipe.model.seq_len :]], device=self._job.device)
            coroutine = hidden_states(self.trunk, self._pool_map, context_1S, index)
            ((h_1SD, _),) = self._pool.run([coroutine], lane_order, step)
            with self.trunk.autocast():
                logits_V = self.trunk.head(h_1SD[:, -1]).float().cpu()[0]
            sound = sound and bool(logits_V.isfinite().all())
            probabilities_V = (logits_V / temperature).softmax(0)
            ids.append(int(torch.multinomial(probabilities_V, 1, generator=generator)) if sound else 0)
        return ids[len(prompt) :] if sound else None

    @property
    def monitors(self) -> Monitors:
        """DeepSpeed's."""
        return self.engines["trunk"].monitors

    def state_dict(self) -> dict[str, Any]:
        """What the engines do not hold, as copies."""
        return {
            "statistics": self._statistics.state_dict(),
            "recent_load_LM": self._recent_load_LM.clone(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any], steps: int, shift: int) -> None:
        """Take over what `state_dict` gave, after the engines have loaded.

        Args:
            steps: steps done.
            shift: how much higher micro-batches are numbered than when it was saved.
        """
        saved = state["statistics"]
        by_step = self._statistics.scope == "global_batch"
        if (saved["scope"], saved["delay"]) == (self._statistics.scope, self._statistics.delay):
            self._statistics.load_state_dict(saved, 0 if by_step else shift)
        else:
            self._statistics.begin_at(steps if by_step else steps * self._recipe.micro_batches)
        self._recent_load_LM = state["recent_load_LM"].cpu()
        torch.set_rng_state(state["rng"].cpu())
        if self._shard is not None:
            self._shard.weights_changed()

    def recorded_load(self) -> NDArray[np.int64] | None:
        """Assignments a step by layer and global expert (L, M), a mean over about the last `LOAD_STEPS` steps."""
        if self._pool_map is None:
            return None
        return self._over_all_experts(self._recent_load_LM.round())

    def _over_all_experts(self, load_LM: Tensor) -> NDArray[np.int64]:
        """From the experts that each layer sees to all of the pool, by global id; 0 where a layer does not reach."""
        assert self._pool_map
        of_all_LM = np.zeros((len(load_LM), self._recipe.pool.experts), dtype=np.int64)
        for layer, row in enumerate(load_LM.numpy()):
            first = self._pool_map.first_expert(layer)
            of_all_LM[layer, first : first + len(row)] = row
        return of_all_LM
