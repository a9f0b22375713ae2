"""The service: how a pool rank answers the requests of a schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import Kind, RequestKey, Slot
from pool.shard import ExpertServer, ExpertShard
from pool.wire import Arrived, PoolWire, WireError
from pool.wire.clock import Waits, clock_of


@dataclass(frozen=True)
class Served:
    """What a pool rank has served.

    Attributes:
        tokens_Le: Assignments of forwards, by layer and local expert (int64, host).
        gradients_e: Assignments of backwards, by local expert (int64, host).
        queue_depth: Number of slots received but not begun when one was done, mean over the slots.
        deferred_bytes: Largest size of deferred weight-gradient work.
    """

    tokens_Le: Tensor
    gradients_e: Tensor
    queue_depth: float
    deferred_bytes: int


class PoolService:
    """Serves the slots of a schedule: receive, one merged launch, answer; weight gradients while no request waits.

    Attributes:
        wire: The wire's end that brings the requests.
        waits: Time spent waiting for requests, and for payloads of requests whose headers have come.
    """

    def __init__(self, shard: ExpertShard, wire: PoolWire, layers: int):
        self.shard = shard
        self._server = ExpertServer(shard)
        self.wire = wire
        self._tokens_Le = torch.zeros(layers, len(shard.expert_ids), dtype=torch.int64)
        self._gradients_e = torch.zeros(len(shard.expert_ids), dtype=torch.int64)
        self.waits = Waits(clock_of(shard.w2_eDF.device))
        self._queue_depths: list[int] = []
        topology, rank = wire.settings.topology, wire.settings.rank
        self._served = frozenset(topology.served_trunk_ranks(rank))
        self._receives = self._served != {rank}  # a rank that serves itself only receives nothing

    def serve(self, slots: Iterable[Slot], step: int) -> None:
        """Serve every request of `slots` that comes from one of this rank's trunk ranks.

        Raises:
            WireError: See `PoolWire.receive`; also a backward without its forward, or with other counts.
        """
        for _ in self.serving(slots, step):
            pass

    def serving(self, slots: Iterable[Slot], step: int) -> Generator[None]:
        """Serve like `serve`, but slot by slot: each `next` serves the next slot with a request for this rank.

        Receiving starts with this call. Deferred weight gradients are sealed at the empty slots before a slot; the end
        of the iterator seals at those that are left.
        """
        serving = self._serving(slots, step)
        next(serving)
        return serving

    def _serving(self, slots: Iterable[Slot], step: int) -> Generator[None]:
        """See `serving`; the first `next` starts to receive."""
        mine = [(slot, [key for key in slot if key.trunk_rank in self._served]) for slot in slots]
        # A thread receives in the schedule's order while this one computes. The lanes bound what it holds, because what
        # has arrived is released once it has been served.
        coming = deque(self.wire.receive(keys, step) for _, keys in mine if keys)
        try:
            yield
            for slot, keys in mine:
                if keys:
                    self._serve_slot(keys, coming.popleft(), step)
                    if self._receives:
                        done = takewhile(lambda arrived: arrived.future.done(), coming)
                        self._queue_depths.append(sum(1 for _ in done))
                    yield
                elif not slot:
                    self.shard.deferred_dw.seal()
        except BaseException:
            self.wire.stop()
            raise
        assert self._server.open_forwards == 0, "the schedule leaves forwards without a backward"

    def _serve_slot(self, keys: list[RequestKey], coming: Arrived, step: int) -> None:
        self.shard.deferred_dw.drain_until(coming.future)
        clock = self.waits.clock
        since = clock.now()
        headers = clock.latest(coming.headers_came)
        batches = coming.ready()
        self.waits.waited(since, headers)
        requests = dict(zip(keys, batches, strict=True))
        for kind in Kind:
            self._serve_kind(kind, [k for k in keys if k.kind == kind], requests, step)
        self.shard.deferred_dw.drain_if_full()

    def _serve_kind(
        self, kind: Kind, keys: list[RequestKey], requests: dict[RequestKey, tuple[Tensor, Counts]], step: int
    ) -> None:
        if not keys:
            return
        batches = [requests[key] for key in keys]
        if kind == Kind.BACKWARD:
            answers = self._backward(keys, batches)
        else:
            answers = self._server.forward(list(keys), batches, keep_for_backward=kind == Kind.FORWARD)
        for key, (_, counts) in zip(keys, batches, strict=True):
            if kind == Kind.FORWARD:
                self._tokens_Le[key.layer] += torch.tensor(counts.listed)
            elif kind == Kind.BACKWARD:
                self._gradients_e += torch.tensor(counts.listed)
        since = self.waits.clock.now()
        self.wire.answer(keys, step, answers, [served.listed for _, served in batches])
        self.waits.sent(since)

    def _backward(self, keys: list[RequestKey], batches: list[tuple[Tensor, Counts]]) -> list[Tensor]:
        for key, (_, counts) in zip(keys, batches, strict=True):
            forward = self._server.counts(key.forward)
            if forward is None or forward.listed != counts.listed:
                what = "a backward without its forward" if forward is None else "a backward with other token counts"
                me = self.wire.settings.topology.describe(self.wire.settings.rank)
                raise WireError(
                    f"{me} got {what}: trunk rank {key.trunk_rank}, lane {key.lane}, layer {key.layer}, "
                    f"micro-batch {key.micro_batch}"
                )
        return self._server.backward([key.forward for key in keys], [dy_ND for dy_ND, _ in batches])

    def take_served(self) -> Served:
        """Return what was served since the last call."""
        depths = self._queue_depths
        queue_depth = sum(depths) / len(depths) if depths else 0.0
        served = Served(self._tokens_Le, self._gradients_e, queue_depth, self.shard.deferred_dw.peak_bytes)
        self._tokens_Le, self._gradients_e = torch.zeros_like(served.tokens_Le), torch.zeros_like(served.gradients_e)
        self._queue_depths = []
        self.shard.deferred_dw.peak_bytes = 0
        return served
