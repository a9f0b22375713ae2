"""The service: what a pool rank does between optimizer steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pool.experts import ExpertServer, ExpertShard
from pool.plan import Kind, RequestKey, Slot
from pool.wire import PoolWire, WireError


class PoolService:
    """Serves the slots of a plan: receive, one merged launch, answer; weight gradients when nobody waits.

    Attributes:
        tokens_Le: assignments served since the last `take_load`, by layer and local expert (int64, host).
        seconds_waiting, seconds_busy: time in waits for requests, and in everything else inside `serve`, since the
            start; the weight gradients that are left for the end of a step are in neither.
    """

    def __init__(self, shard: ExpertShard, wire: PoolWire, layers: int):
        self.shard = shard
        self._server = ExpertServer(shard)
        self._wire = wire
        self._receiver = ThreadPoolExecutor(1, "receiver")
        self.tokens_Le = torch.zeros(layers, len(shard.expert_ids), dtype=torch.int64)
        self.seconds_waiting = 0.0
        self.seconds_busy = 0.0
        topology, rank = wire.settings.topology, wire.settings.rank
        self._served = frozenset(topology.served_trunk_ranks(rank))

    def serve(self, slots: Iterable[Slot], step: int) -> None:
        """Serve every request of `slots` that comes from one of this rank's trunk ranks.

        Raises:
            WireError: see `PoolWire.receive`; also a backward whose forward never came, or with other counts.
        """
        mine = [(slot, [key for key in slot if key.trunk_rank in self._served]) for slot in slots]
        # A thread receives in the plan's order while this one computes; what it holds is bounded by the lanes. A slot's
        # future holds what was received for it, and is let go when the slot has been served.
        coming = deque(self._receiver.submit(self._wire.receive_in_thread, keys, step) for _, keys in mine if keys)
        try:
            for slot, keys in mine:
                if keys:
                    self._serve_slot(keys, coming.popleft(), step)
                elif not slot:
                    self.shard.cut()
        except BaseException:
            # Not waited for: the thread may be in a wait for a message that never comes.
            self._receiver.shutdown(wait=False, cancel_futures=True)
            raise
        assert self._server.open_forwards == 0, "the plan leaves forwards without a backward"

    def _serve_slot(self, keys: list[RequestKey], coming: Future[list[tuple[Tensor, list[int]]]], step: int) -> None:
        started = time.perf_counter()
        while not coming.done() and self.shard.flush_some():
            pass
        self.seconds_busy += time.perf_counter() - started
        started = time.perf_counter()
        requests = dict(zip(keys, coming.result(), strict=True))
        received = time.perf_counter()
        for kind in Kind:
            self._serve_kind(kind, [k for k in keys if k.kind == kind], requests, step)
        self.shard.flush_if_full()
        self.seconds_waiting += received - started
        self.seconds_busy += time.perf_counter() - received

    def _serve_kind(
        self, kind: Kind, keys: list[RequestKey], requests: dict[RequestKey, tuple[Tensor, list[int]]], step: int
    ) -> None:
        if not keys:
            return
        batches = [requests[key] for key in keys]
        if kind == Kind.BACKWARD:
            answers = self._backward(keys, batches)
        else:
            answers = self._server.forward(list(keys), batches, keep_for_backward=kind == Kind.FORWARD)
        if kind == Kind.FORWARD:
            for key, (_, counts) in zip(keys, batches, strict=True):
                self.tokens_Le[key.layer] += torch.tensor(counts)
        for key, (_, served), answer_ND in zip(keys, batches, answers, strict=True):
            self._wire.answer(key, step, answer_ND, served)

    def _backward(self, keys: list[RequestKey], batches: list[tuple[Tensor, list[int]]]) -> list[Tensor]:
        for key, (_, counts) in zip(keys, batches, strict=True):
            forward = self._server.tokens_per_expert(key.forward)
            if forward != counts:
                what = "a backward without its forward" if forward is None else "a backward with other token counts"
                me = self._wire.settings.topology.describe(self._wire.settings.rank)
                raise WireError(
                    f"{me} got {what}: trunk rank {key.trunk_rank}, lane {key.lane}, layer {key.layer}, "
                    f"micro-batch {key.micro_batch}"
                )
        return self._server.backward([key.forward for key in keys], [dy_ND for dy_ND, _ in batches])

    def take_load(self) -> Tensor:
        """tokens_Le, which starts again at 0."""
        taken_Le, self.tokens_Le = self.tokens_Le, torch.zeros_like(self.tokens_Le)
        return taken_Le
