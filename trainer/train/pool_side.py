"""The pool as a trunk rank has it: a client, and in two of the layouts a shard in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from pool.placement import Placement
from pool.service import PoolService
from pool.shard import ExpertShard
from pool.wire import PoolWire, TrunkWire, both_ends, trunk_wire
from trainer.cluster.process_groups import Job
from trainer.config.recipe import Recipe
from trainer.engine.experts import build_shard, load_of, reduce_expert_gradients, wire_settings
from trainer.engine.role_engine import Engine, build_engine
from trainer.model.pool_client import LocalPool, PoolClient, RemotePool, SharedPool
from trainer.telemetry.prometheus import ExpertLoad
from trainer.telemetry.time_breakdown import Serving


class PoolSide:
    """What a trunk rank has of the pool: nothing (dense), a way to it, the whole of it, or a shard that it serves.

    Args:
        placement: Where the experts live; None for a dense model.

    Attributes:
        client: Runs micro-batches and has their requests answered.
        shard: The experts in this process: all of them in the colocated layout; None in the dedicated one.
        service: What serves the shard to other ranks, where every rank has both roles.
        engines: The shard's engine by its name in a checkpoint.
        replica: Which copy of its shard this rank holds.
    """

    def __init__(self, recipe: Recipe, job: Job, placement: Placement | None):
        self._recipe, self._job, topology = recipe, job, job.topology
        self.client = PoolClient(job.device)
        self.shard: ExpertShard | None = None
        self.service: PoolService | None = None
        self.engines: dict[str, Engine] = {}
        self.replica = topology.replica(job.rank) if topology.every_rank else job.rank
        self._wires: Sequence[TrunkWire | PoolWire] = ()
        if placement is None:
            return
        if not topology.dedicated:
            index = topology.shard(job.rank) if topology.every_rank else 0
            self.shard = build_shard(recipe, placement, index, job.device)
            engine = build_engine(self.shard, recipe, "pool", topology.replicas, job.shard_group)
            self.engines = {f"pool/shard_{index}": engine}
        if self.shard is None:
            wire = trunk_wire(wire_settings(recipe, job, placement), job.wire_groups)
            self._wires = (wire,)
            self.client = RemotePool(wire, job.rank)
        elif topology.every_rank:
            wire, pool_wire = both_ends(wire_settings(recipe, job, placement), job.wire_groups)
            self._wires = (wire, pool_wire)
            self.service = PoolService(self.shard, pool_wire, recipe.model.layers)
            self.client = SharedPool(wire, job.rank, self.service)
        else:
            self.client = LocalPool(self.shard)

    @property
    def serving(self) -> Serving | None:
        """The time that the service takes, if there is one."""
        client = self.client
        return Serving(client.serving, client.service.waits) if isinstance(client, SharedPool) else None

    def limit(self, limit: timedelta | None = None) -> None:
        """Set the longest wait for a message; without one, that of the recipe."""
        for wire in self._wires:
            wire.limit = limit or wire.settings.timeout

    def reduce_gradients(self) -> None:
        """Complete the gradients of the shard's weights, at the end of a step's work."""
        if self.shard is not None:
            reduce_expert_gradients(self.shard, self._recipe)

    def weights_changed(self) -> None:
        """Use new weights of the shard from here on."""
        if self.shard is not None:
            self.shard.weights_changed()

    def move_to(self, placement: Placement) -> None:
        """Hold the experts of another placement from here on, whose weights are loaded afterwards."""
        if self.shard is not None:
            topology = self._job.topology
            self.shard.expert_ids = placement.experts_of(topology.shard(self._job.rank) if topology.every_rank else 0)

    def expert_load(self) -> ExpertLoad | None:
        """Return the load to serve as metrics: of this rank's shard, or on rank 0 of the whole pool if colocated."""
        recipe = self._recipe
        if self.shard is None or (self.service is None and self.replica):
            return None
        if self.service:
            return load_of(self.shard, recipe)
        layers = recipe.model.layers if recipe.metrics.per_layer_experts else 0
        return ExpertLoad(range(recipe.pool.experts), recipe.pool.experts, layers, backward=False)
