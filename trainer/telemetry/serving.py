"""How a rank's metrics are served before it has joined its job and then, and what the rank is doing."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from trainer.cluster.fault_watch import FaultWatch
from trainer.cluster.rank_assignment import ROLE, provisional_rank
from trainer.cluster.rendezvous import Launch, Member
from trainer.common.errors import START_AGAIN, UserError
from trainer.config.recipe import Recipe
from trainer.telemetry.measured import Place, node_name
from trainer.telemetry.prometheus import MetricsServer
from trainer.telemetry.rank_time import Phase


@dataclass(frozen=True)
class Stage:
    """What a rank is doing, as its messages and its metrics say."""

    watch: FaultWatch
    metrics: MetricsServer

    def enter(self, phase: Phase, doing: str) -> None:
        """Begin something, which messages describe as `doing`."""
        self.watch.phase = doing
        self.metrics.time.enter(phase)

    def end(self, status: int) -> None:
        """Begin the end of the rank with an exit status: all is done, or it will be started again, or it has failed."""
        ends: dict[int, Phase] = {0: "finished", START_AGAIN: "stopping"}
        self.enter(ends.get(status, "failed"), "shutdown")


def serve_early(recipe: Recipe, launch: Launch) -> MetricsServer:
    """Serve a rank's metrics before anything else is done.

    If its port is taken, as by a rank that is just ending, or depends on a number that only the rendezvous tells,
    `serve_joined` tries again.
    """
    rank = provisional_rank(recipe.grid, recipe.topology.order, launch.world_size, launch.rank)
    role = os.environ.get(ROLE, "") if rank is None else role_of(recipe, rank)
    metrics = MetricsServer(role, rank)
    with suppress(UserError):
        metrics.listen(recipe.metrics, launch.local_rank)
    return metrics


def serve_joined(recipe: Recipe, member: Member, metrics: MetricsServer) -> None:
    """Serve where a rank runs, and tell rank 0 its page's address (`shared.gather("metrics")`).

    Raises:
        UserError: It cannot listen on its port.
    """
    rank, sight = member.rank, member.sight
    ordinal = member.devices.ordinals[rank]
    place = Place(
        local_rank=member.local_rank,
        node=node_name(),
        device=member.devices.names[rank],
        gpu_uuid="" if ordinal is None else sight.gpus[ordinal].uuid_of_tools,
        ordinal=ordinal,
        unused_gpus=sight.unused,
    )
    metrics.joined(role_of(recipe, rank), rank, place)
    try:
        metrics.listen(recipe.metrics, member.local_rank)
    finally:
        member.shared.put("metrics", metrics.address)


def role_of(recipe: Recipe, rank: int) -> str:
    """Return the role of a rank as the label of metrics: one that has both counts as a trunk rank."""
    return "trunk" if recipe.grid.is_trunk(rank) else "pool"
