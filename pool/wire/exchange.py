"""Payloads on GPUs where every rank has both roles: one grouped exchange for each slot, in the order of the slots.

A rank then sends and receives on the same communicator. If it launched sends and receives one by one, ranks could wait
for each other in a circle: a stream runs one after the other, and of three ranks each could be sending to the next
before it receives from the one before. So all requests of a slot travel in one group of NCCL, in which sends and
receives run together, and so do all answers of one launch of the experts. There are two communicators, for requests and
for answers, over the ranks that serve each other (those of a replica of the shards), each with one thread and one
stream on every rank. What a rank sends to its own shard is copied on the same stream.

A group is launched when everything in it has been computed, on all ranks. A sender thread waits for the event behind a
payload, and then sends its header to all other ranks. The thread of a communicator takes one slot after the other: it
waits for the rank's own part and for the headers of all others, and launches the group. So:

- A rank launches its part of a group when all parts exist, and then so does every other rank: for that they need only
  headers that have been sent. Nothing that is launched waits for what is still to be computed anywhere.
- All ranks launch the same groups in the same order. Take the first group that is not done on some rank: on every rank
  what is before it on its stream is done, and it is launched, so it gets done.
- A host waits for the launch of a group only where the schedule has a rank's work behind that slot, and schedules are
  orders of one possible run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import RequestKey
from pool.wire.check import altered, not_conserved
from pool.wire.contract import Exchange, WireError, WireGroups, WireSettings
from pool.wire.device import ANSWER_TAG, REQUEST_TAG, DeviceAnswer, DeviceArrived, DeviceEnd, Header, Request, Slot
from pool.wire.streams import Event
from pool.wire.watcher import Worker


@dataclass
class _Request(Request):
    """A request of this rank.

    Attributes:
        rows: By shard, from when the counts are known until they have been launched.
        headers: To all other ranks.
    """

    rows: Sequence[Tensor] = ()
    headers: list[Header] = field(default_factory=list)


@dataclass
class _Served:
    """Answers of one launch of this rank's experts, which are there at `ready`.

    Attributes:
        parts: Of each its exchange with the rank that made the request, its rows, and the tokens of each local expert.
        headers: To all other ranks.
    """

    parts: list[tuple[Exchange, Tensor, list[int]]]
    ready: Event
    headers: list[Header] = field(default_factory=list)

    def of(self, rank: int) -> list[tuple[Exchange, Tensor, list[int]]]:
        """Return the answers to a rank."""
        return [part for part in self.parts if part[0].peer == rank]


@dataclass(frozen=True)
class _Coming:
    """A slot whose requests are to be exchanged; `own` are those of this rank."""

    exchanges: list[Exchange]
    own: dict[Exchange, Future[_Request]]
    arrived: DeviceArrived


class ExchangeTrunk(DeviceEnd):
    """A rank's end for its own requests; see `pool.wire.contract.TrunkWire`.

    Attributes:
        ranks: Those that serve each other, in the order of the shards.
        others: The same without this one.
        sender: Waits for what has been launched, and sends headers.
        answers: Exchanges the answers of one launch of the experts after the other.
    """

    def __init__(self, settings: WireSettings, groups: WireGroups):
        super().__init__(settings, groups)
        topology = settings.topology
        self.ranks = [topology.pool_rank(shard, settings.rank) for shard in range(topology.expert_parallel)]
        self.others = [rank for rank in self.ranks if rank != settings.rank]
        self._checking, self._stream = self.streams.new(), self.streams.new()
        self._computed: dict[Exchange, Future[_Request]] = {}
        self._not_served: set[Exchange] = set()
        self._open: dict[RequestKey, _Request] = {}  # those that have no answer yet
        self.sender: Worker[Callable[[], None]] = Worker("sender", self._send, self.watcher)
        self.answers: Worker[_Served] = Worker("answers", self._exchange, self.watcher)

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> DeviceAnswer:
        """See `TrunkWire.request`."""
        own = Exchange(self.settings.rank, key, step)
        answer = DeviceAnswer(self.watcher.promise(), self.streams, partial(self._check_served, own))
        sent_ND = rows_ND.to(self.settings.dtype).contiguous()
        counts_M = self.streams.to_host(tokens_per_expert_M)
        request = _Request(key, step, sent_ND, counts_M, self.streams.record(), answer)
        self._not_served.add(own)
        self.sender.put(partial(self._send_request, request, self.computed(own)))
        return answer

    def computed(self, exchange: Exchange) -> Future[_Request]:
        """Return the promise of a request of this rank, which is kept when it has been computed.

        Whoever makes the request and whoever serves it call this once each, in any order, from the same thread.
        """
        promise = self._computed.pop(exchange, None)
        return promise or self._computed.setdefault(exchange, self.watcher.promise())

    def check_made(self, exchanges: Sequence[Exchange]) -> None:
        """Check that requests of this rank have been made: a wait for those that have not would not end."""
        for exchange in exchanges:
            if exchange in self._computed:
                raise WireError(f"{self.me} is to serve a request of its own that it has not made: {exchange}")

    def serves(self, exchanges: Iterable[Exchange]) -> None:
        """Note that this rank has served requests."""
        self._not_served.difference_update(exchanges)

    def _check_served(self, own: Exchange) -> None:
        """Check that this rank has served its part of a request: a wait for the answer would not end."""
        if own in self._not_served:
            raise WireError(f"{self.me} needs the answer to a request of its own that it has not served: {own}")

    def _send(self, send: Callable[[], None]) -> None:
        with self.streams.on(self._checking):
            send()

    def _send_request(self, request: _Request, computed: Future[_Request]) -> None:
        """Send the headers of a request once it has been computed."""
        request.ready.synchronize()
        rows_ND, request.rows_ND = request.rows_ND, None
        assert rows_ND is not None
        request.counts_se = request.counts_M.reshape(-1, self.settings.num_local_experts).tolist()
        sizes = [sum(counts) for counts in request.counts_se]
        if self.settings.check:
            self.check_rows(len(rows_ND), sum(sizes), request.key, request.step)
        request.rows = rows_ND.split(sizes)
        for rank, counts, rows in zip(self.ranks, request.counts_se, request.rows, strict=True):
            exchange = request.exchange(rank)
            self._check_finite(rows, "the tokens to", exchange)
            if rank != self.settings.rank:
                header = self._send_header(exchange, counts, rows, REQUEST_TAG, "send a header to")
                request.headers.append(header)
        self._open[request.key] = request
        self.watcher.keep_promise(computed, request)

    def _exchange(self, served: _Served) -> None:
        """Exchange the answers of one launch of the experts, which all ranks have computed."""
        s = self.settings
        own = [exchange for exchange, _, _ in served.of(s.rank)]
        expected = own or [served.parts[0][0]]
        doing = "get the answer's header of"
        headers = {
            rank: self._get_header(replace(expected[0], peer=rank), ANSWER_TAG, doing, len(expected))
            for rank in self.others
        }
        returned = {rank: self._check_headers(header, expected) for rank, header in headers.items()}
        sends = [(exchange, rows_ND) for exchange, rows_ND, _ in served.parts if exchange.peer != s.rank]
        receives: list[tuple[Exchange, Tensor]] = []
        copies: list[tuple[Tensor, Tensor]] = []
        answers: list[tuple[_Request, Tensor]] = []
        with self.streams.on(self._stream):
            for place, (exchange, own_ND, own_counts) in enumerate(served.of(s.rank)):
                request = self._open.pop(exchange.key)
                sizes = [sum(counts) for counts in request.counts_se]
                rows_ND = self.streams.empty(sum(sizes), s.hidden, dtype=s.dtype)
                for rank, rows, sent in zip(self.ranks, rows_ND.split(sizes), request.counts_se, strict=True):
                    from_rank = replace(exchange, peer=rank)
                    if rank == s.rank:
                        self._conserved(from_rank, sent, own_counts, len(own_ND))
                        copies.append((rows, own_ND))
                        continue
                    counts, fingerprint = returned[rank][place]
                    self._conserved(from_rank, sent, counts, *fingerprint[:1])
                    receives.append((from_rank, rows))
                answers.append((request, rows_ND))
                self.bytes_received += rows_ND.nbytes - own_ND.nbytes
            works = self._launch(self._answers, sends, receives, "exchange answers with")
            self._copy(copies)  # meanwhile
            for work in works:
                work.wait()
            came = self.streams.record()
            if s.check:
                came.synchronize()
                for exchange, rows_ND in receives:
                    _, fingerprint = returned[exchange.peer][expected.index(replace(exchange, peer=s.rank))]
                    if wrong := altered(rows_ND, fingerprint):
                        self.refuse("the answer of", wrong, exchange)
        for request, rows_ND in answers:
            self.watcher.keep_promise(request.answer.future, (rows_ND, came))
        for header in served.headers:
            header.wait()

    def _check_headers(self, header: Header, expected: Sequence[Exchange]) -> list[tuple[list[int], list[int]]]:
        """Wait for a rank's headers of answers; return (tokens served of each expert, fingerprint) of each."""
        header.wait()
        self.bytes_received += header.message.nbytes
        found = []
        for exchange, message in zip(expected, header.message.chunk(len(expected)), strict=True):
            fields, served, returned = self.split(message)
            self.check_fields(fields, "an answer", replace(exchange, peer=header.exchange.peer))
            found.append((served, returned))
        return found

    def _conserved(self, exchange: Exchange, sent: Sequence[int], served: Sequence[int], returned: int = 0) -> None:
        """Check that as many tokens were served and come back as were sent."""
        if self.settings.check and (wrong := not_conserved(sent, sum(sent), served, returned)):
            self.refuse("the answer of", wrong, exchange)


class ExchangePool(DeviceEnd):
    """A rank's end for what it serves; see `pool.wire.contract.PoolWire`.

    All slots of a step have to be given to `receive` before the step's first request is made: whoever gets a request's
    header relies on its sender's launching the slot without computing anything first.

    Args:
        trunk: This rank's other end.
    """

    def __init__(self, settings: WireSettings, groups: WireGroups, trunk: ExchangeTrunk):
        super().__init__(settings, groups, trunk.watcher)
        self._trunk = trunk
        self._stream = self.streams.new()
        self._receiver: Worker[_Coming] = Worker("requests", self._exchange, self.watcher)

    def receive(self, keys: Sequence[RequestKey], step: int) -> DeviceArrived:
        """See `PoolWire.receive`."""
        exchanges = [Exchange(key.trunk_rank, key, step) for key in keys]
        own = {e: self._trunk.computed(e) for e in exchanges if e.peer == self.settings.rank}
        arrived = DeviceArrived(self.watcher.promise(), self.streams, partial(self._trunk.check_made, list(own)))
        self._receiver.put(_Coming(exchanges, own, arrived))
        return arrived

    def _exchange(self, coming: _Coming) -> None:
        """Exchange the requests of a slot, which all ranks have computed."""
        s, shard = self.settings, self.settings.topology.shard(self.settings.rank)
        own = {exchange: promise.result() for exchange, promise in coming.own.items()}
        headers = {
            exchange: self._get_header(exchange, REQUEST_TAG, "get a header from")
            for exchange in coming.exchanges
            if exchange not in own
        }
        sends: list[tuple[Exchange, Tensor]] = []
        receives: list[tuple[Exchange, Tensor]] = []
        copies: list[tuple[Tensor, Tensor]] = []
        requests: list[tuple[Tensor, Counts]] = []
        fingerprints: list[list[int]] = []
        for header in headers.values():
            header.wait()
        with self.streams.on(self._stream):
            for exchange in coming.exchanges:
                if exchange in own:
                    counts = own[exchange].counts_se[shard]
                else:
                    counts, sent = self.check_request(headers[exchange].message, exchange)
                rows_ND = self.streams.empty(sum(counts), s.hidden, dtype=s.dtype)
                requests.append((rows_ND, Counts(self.streams.to_device(counts), counts)))
                if exchange in own:
                    rows, own[exchange].rows = own[exchange].rows, ()  # from here on the watcher keeps them
                    copies.append((rows_ND, rows[shard]))
                    sends += [
                        (replace(exchange, peer=rank), part)
                        for rank, part in zip(self._trunk.ranks, rows, strict=True)
                        if rank != s.rank
                    ]
                else:
                    receives.append((exchange, rows_ND))
                    fingerprints.append(sent)
                    self.bytes_received += headers[exchange].message.nbytes + rows_ND.nbytes
            works = self._launch(self._requests, sends, receives, "exchange tokens with")
            self._copy(copies)  # meanwhile
            for work in works:
                work.wait()
            slot = Slot(requests, self.streams.record(), time.perf_counter())
            if s.check:
                slot.came.synchronize()
                for (exchange, rows_ND), sent in zip(receives, fingerprints, strict=True):
                    if wrong := altered(rows_ND, sent):
                        self.refuse("the tokens of", wrong, exchange)
        self.watcher.keep_promise(coming.arrived.future, slot)
        for request in own.values():
            for sent_header in request.headers:
                sent_header.wait()  # all ranks have its slot before them, as this one had

    def answer(
        self, keys: Sequence[RequestKey], step: int, rows: Sequence[Tensor], served: Sequence[Sequence[int]]
    ) -> None:
        """See `PoolWire.answer`."""
        self.watcher.check()
        exchanges = [Exchange(key.trunk_rank, key, step) for key in keys]
        self._trunk.serves(exchanges)
        parts = list(zip(exchanges, (rows_ND.contiguous() for rows_ND in rows), map(list, served), strict=True))
        self._trunk.sender.put(partial(self._send, _Served(parts, self.streams.record())))

    def _send(self, answers: _Served) -> None:
        """Send the headers of answers once they have been computed, then exchange them.

        A rank that gets no answer gets a header too, which says that this rank has computed those to others.
        """
        answers.ready.synchronize()
        for exchange, rows_ND, _ in answers.parts:
            self._check_finite(rows_ND, "the answer to", exchange)
        first = answers.parts[0][0]
        nothing = torch.empty(0, self.settings.hidden, dtype=self.settings.dtype), [0] * self.settings.num_local_experts
        for rank in self._trunk.others:
            parts = answers.of(rank) or [(first, *nothing)]
            values = [value for part in parts for value in self._header(part[0], part[2], part[1])]
            exchange = replace(parts[0][0], peer=rank)
            answers.headers.append(self._send_message(values, exchange, ANSWER_TAG, "send an answer to"))
        self._trunk.answers.put(answers)
