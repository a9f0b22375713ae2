"""The pool's schedule: which requests are served together, in which order, and how trunk ranks take turns with lanes.

A schedule is the same on all ranks and is followed whatever the real timings are. The order of every sum is therefore
fixed: wrong cost estimates make a step slower, but never change its result. `pool.schedule_builder` makes schedules;
the lock-step schedule, in which a slot holds the same request of every trunk rank, is the reference.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What a request asks for."""

    FORWARD = 1
    FORWARD_ONLY = 2
    BACKWARD = 3


@dataclass(frozen=True)
class RequestKey:
    """Identifies a request within an optimizer step or an evaluation."""

    trunk_rank: int
    lane: int
    micro_batch: int
    layer: int
    kind: Kind

    @property
    def forward(self) -> RequestKey:
        """The forward request that belongs to this backward request."""
        return RequestKey(self.trunk_rank, self.lane, self.micro_batch, self.layer, Kind.FORWARD)


Slot = tuple[RequestKey, ...]
"""Requests that are served in one merged launch. An empty slot seals the deferred weight gradients: from there on the
pool computes them whenever no request is waiting."""


SERVE = -1
"""Instead of a lane: a rank that has both roles serves the next slot with a request for it, after sealing weight
gradients at the empty slots before that."""


WARM_UP_STEP = -1
"""Number of the step before the first one, which leaves nothing behind."""


@dataclass(frozen=True)
class PoolSchedule:
    """The order of an optimizer step, an evaluation or a generation.

    Attributes:
        slots: What the pool serves, in order; a pool rank skips requests of trunk ranks that it does not serve.
        lane_order: For every trunk rank, the lane that it runs next, one entry per segment; where every rank has both
            roles, there is also one SERVE per slot that it serves.
    """

    slots: tuple[Slot, ...]
    lane_order: tuple[tuple[int, ...], ...]

    def for_trunk_ranks(self, trunk_ranks: Collection[int]) -> PoolSchedule:
        """Return the schedule with the requests of some trunk ranks only, as a pool rank that serves these needs it.

        Slots in which they have none are left out; those that are empty for all remain.
        """
        chosen = frozenset(trunk_ranks)
        mine = ((slot, tuple(key for key in slot if key.trunk_rank in chosen)) for slot in self.slots)
        return PoolSchedule(tuple(kept for slot, kept in mine if kept or not slot), self.lane_order)


def lockstep_schedule(trunk_ranks: int, micro_batches: int, layers: int, every_rank: bool = False) -> PoolSchedule:
    """An optimizer step in which all trunk ranks do one micro-batch after the other, layer by layer, together.

    Args:
        every_rank: Whether each rank has both roles, and so serves each slot itself (`Topology.every_rank`).
    """
    micro_batch = [(layer, Kind.FORWARD) for layer in range(layers)]
    micro_batch += [(layer, Kind.BACKWARD) for layer in reversed(range(layers))]
    slots = tuple(_slot(trunk_ranks, number, *request) for number in range(micro_batches) for request in micro_batch)
    return PoolSchedule(slots, (_one_lane(2 * layers, every_rank) * micro_batches,) * trunk_ranks)


def generation_schedule(trunk_ranks: int, tokens: int, layers: int, every_rank: bool = False) -> PoolSchedule:
    """A generation: each token is a micro-batch that waits for the one before; `lane_order` is that of one token.

    Args:
        every_rank: See `lockstep_schedule`.
    """
    slots = (_slot(trunk_ranks, token, layer, Kind.FORWARD_ONLY) for token in range(tokens) for layer in range(layers))
    return PoolSchedule(tuple(slots), (_one_lane(layers, every_rank),) * trunk_ranks)


def _one_lane(requests: int, every_rank: bool) -> tuple[int, ...]:
    """The lane order of one micro-batch that makes so many requests."""
    return ((0, SERVE) if every_rank else (0,)) * requests + (0,)


def _slot(trunk_ranks: int, micro_batch: int, layer: int, kind: Kind) -> Slot:
    return tuple(RequestKey(trunk_rank, 0, micro_batch, layer, kind) for trunk_rank in range(trunk_ranks))
