"""The service plan: which requests the pool serves together, in which order.

A plan is a list of slots. It is the same on all ranks and holds whatever the real timings are, so that sums never
depend on them. The lock-step plan is the simplest: a slot has the same request of every trunk rank.
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


def lockstep_plan(trunk_ranks: int, micro_batches: int, layers: int) -> Iterator[Slot]:
    """One optimizer step: micro-batch after micro-batch, forward then backward, all trunk ranks of a layer together."""
    for micro_batch in range(micro_batches):
        for layer in range(layers):
            yield _slot(range(trunk_ranks), micro_batch, layer, Kind.FORWARD)
        for layer in reversed(range(layers)):
            yield _slot(range(trunk_ranks), micro_batch, layer, Kind.BACKWARD)


def forward_only_plan(trunk_ranks: range, micro_batches: int, layers: int) -> Iterator[Slot]:
    """An evaluation or a generation: forwards of `trunk_ranks`, of which the pool keeps nothing."""
    for micro_batch in range(micro_batches):
        for layer in range(layers):
            yield _slot(trunk_ranks, micro_batch, layer, Kind.FORWARD_ONLY)


def _slot(trunk_ranks: range, micro_batch: int, layer: int, kind: Kind) -> Slot:
    return tuple(RequestKey(t, 0, micro_batch, layer, kind) for t in trunk_ranks)
