"""The service plan: which requests the pool serves together and in which order, and how trunk ranks go through lanes.

A plan is the same on all ranks and holds whatever the real timings are, so that sums never depend on them: wrong costs
make it slower, never different. `pool.schedule_builder` makes it; the lock-step plan is the reference, in which a slot
has the same request of every trunk rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What a request asks for."""

    FORWARD = 1
    FORWARD_ONLY = 2
    BACKWARD = 3


@dataclass(frozen=True)
class RequestKey:
    """Names a request within an optimizer step, or within an evaluation."""

    trunk_rank: int
    lane: int
    micro_batch: int
    layer: int
    kind: Kind

    @property
    def forward(self) -> RequestKey:
        """The forward whose backward this is."""
        return RequestKey(self.trunk_rank, self.lane, self.micro_batch, self.layer, Kind.FORWARD)


Slot = tuple[RequestKey, ...]
"""Requests served in one merged launch. An empty slot cuts the stash: its weight gradients are made from there on,
while nothing waits."""


@dataclass(frozen=True)
class PoolSchedule:
    """An optimizer step or an evaluation.

    Attributes:
        slots: what the pool serves, in order; a pool rank leaves out the trunk ranks that it does not serve.
        lane_order: for every trunk rank which lane it runs next, one entry a segment.
        seconds: predicted time, in the unit of the costs.
        trunk_busy, pool_busy: predicted shares of that time in which either side works.
    """

    slots: tuple[Slot, ...]
    lane_order: tuple[tuple[int, ...], ...]
    seconds: float
    trunk_busy: float
    pool_busy: float


def lockstep_plan(trunk_ranks: int, micro_batches: int, layers: int) -> Iterator[Slot]:
    """One optimizer step: micro-batch after micro-batch, forward then backward, all trunk ranks of a layer together."""
    for micro_batch in range(micro_batches):
        for layer in range(layers):
            yield _slot(range(trunk_ranks), micro_batch, layer, Kind.FORWARD)
        for layer in reversed(range(layers)):
            yield _slot(range(trunk_ranks), micro_batch, layer, Kind.BACKWARD)


def forward_only_plan(trunk_ranks: range, micro_batches: int, layers: int) -> Iterator[Slot]:
    """Forwards one after the other, of which the pool keeps nothing: a generation."""
    for micro_batch in range(micro_batches):
        for layer in range(layers):
            yield _slot(trunk_ranks, micro_batch, layer, Kind.FORWARD_ONLY)


def _slot(trunk_ranks: range, micro_batch: int, layer: int, kind: Kind) -> Slot:
    return tuple(RequestKey(t, 0, micro_batch, layer, kind) for t in trunk_ranks)
