"""Payloads on GPUs: a transport that launches only what can finish without anything that is not launched yet.

A send or a receive of NCCL is a kernel that holds SMs until its peer runs too. So a header says that its payload exists
and that its send has been launched, and a receive is launched when its header has come: no receive holds SMs while a
peer computes. No computing thread waits for its device either. It records an event behind a payload and hands both to a
sender thread, which waits for the event, launches the send and writes the header. A receiver thread waits for headers
and launches receives, and the computing stream waits for them.

There are two communicators, one for requests and one for answers. A rank uses each in one direction, from one thread
and on one stream, and all orders follow the schedule:

- a trunk rank sends requests in the order in which its lanes make them, and a pool rank receives them slot by slot; the
  schedule has the requests of a trunk rank in the same order;
- a pool rank sends answers in the order in which it serves them, and a trunk rank receives them in that order, from all
  shards together. All shards serve in the same order, and a header says which request it answers.

Take the first message in these orders that is not done: both ends are launched, and everything before it on either
stream is done, so it gets done. What can happen is that a send waits, on at most `pool.wire.nccl.MAX_CTAS` SMs, for
what its peer launches first: an earlier message, or the same answer together with that of a slower shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import RequestKey
from pool.wire.check import altered, fingerprint, not_conserved, not_finite
from pool.wire.contract import End, Exchange, WireError, WireGroups, WireSettings
from pool.wire.reasons import ran_out
from pool.wire.streams import Communicator, Event, Streams, Work
from pool.wire.watcher import Watcher, Worker

REQUEST_TAG, ANSWER_TAG = 0, 1
_GROUP = 8
"""Messages in a group: NCCL runs no more than these at the same time on a channel, and more would wait for each other
in an order of its own."""

Parts = Sequence[tuple[Exchange, Tensor]]
"""Payloads to or from peers."""


@dataclass(frozen=True)
class Header:
    """A header on its way. It keeps its message alive, and names the exchange in errors."""

    end: DeviceEnd
    work: Any
    message: Tensor
    doing: str
    exchange: Exchange

    def wait(self) -> None:
        """Wait for it. If it is late, so is a message that was launched before the wait, which may be the reason."""
        since = time.monotonic()
        try:
            with self.end.naming(self.doing, self.exchange):
                self.work.wait(self.end.limit)
        except WireError as error:
            late = self.end.watcher.late(since) if ran_out(str(error.__cause__)) else None
            raise late or error from error.__cause__


class DeviceEnd(End):
    """What all ends share: groups, streams, the watcher, headers.

    Args:
        watcher: None makes one for this end.
    """

    def __init__(self, settings: WireSettings, groups: WireGroups, watcher: Watcher | None = None):
        super().__init__(settings)
        assert groups.device is not None
        self._host = groups.host
        self._requests, self._answers = groups.device.requests, groups.device.answers
        self.streams: Streams = groups.device.streams
        communicators = [self._requests, self._answers]
        lost, enter = groups.device.lost, self.streams.enter
        self.watcher = watcher or Watcher(lambda: self.limit, communicators, lost, enter)

    def settle(self) -> None:
        """See `TrunkWire.settle`."""
        self.watcher.settle()

    def stop(self) -> None:
        """See `PoolWire.stop`."""
        self.watcher.fail(WireError(f"{self.me} has stopped"))

    def _send_header(self, exchange: Exchange, counts: Sequence[int], rows_ND: Tensor, tag: int, doing: str) -> Header:
        """Send the header of a payload."""
        return self._send_message(self._header(exchange, counts, rows_ND), exchange, tag, doing)

    def _header(self, exchange: Exchange, counts: Sequence[int], rows_ND: Tensor) -> list[int]:
        """Return the header of a payload, whose bytes are taken to be sent with it."""
        self.bytes_sent += rows_ND.nbytes
        return [*exchange.fields, *counts, *(fingerprint(rows_ND) if self.settings.check else [])]

    def _send_message(self, values: Sequence[int], exchange: Exchange, tag: int, doing: str) -> Header:
        message = torch.tensor(values)
        with self.naming(doing, exchange):
            header = Header(self, self._host.send([message], exchange.peer, tag), message, doing, exchange)
        self.bytes_sent += message.nbytes
        return header

    def _get_header(self, exchange: Exchange, tag: int, doing: str, count: int = 1) -> Header:
        """Start to receive a header, or several in one message."""
        message = torch.cat([self.header_buffer() for _ in range(count)])
        with self.naming(doing, exchange):
            return Header(self, self._host.recv([message], exchange.peer, tag), message, doing, exchange)

    def _launch(self, communicator: Communicator, sends: Parts, receives: Parts, doing: str) -> list[Work]:
        """Launch messages as one group, if any has rows; the list is empty if none has."""
        sends, receives = (
            [(exchange, rows_ND) for exchange, rows_ND in parts if len(rows_ND)] for parts in (sends, receives)
        )
        parts = [*sends, *receives]
        if not parts:
            return []
        failed = partial(self._group_failed, doing, [exchange for exchange, _ in parts])
        to, of = ([(rows_ND, exchange.peer) for exchange, rows_ND in some] for some in (sends, receives))
        try:
            work = communicator.launch(to, of)
        except RuntimeError as error:
            raise failed(error) from error
        self.watcher.launched(communicator, work, [rows_ND for _, rows_ND in parts], failed)
        return [work]

    def _group_failed(self, doing: str, exchanges: Sequence[Exchange], error: BaseException) -> WireError:
        """Return the error of a group, any of whose peers may be the cause."""
        peers = " or ".join(dict.fromkeys(self.name(exchange.peer) for exchange in exchanges))
        return self.failed(doing, exchanges[0], error, peers)

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Launch copies (into, from) of rows that belong to another stream, on the current one."""
        for into_ND, rows_ND in copies:
            if len(rows_ND):
                self.streams.copy(into_ND, rows_ND)
                self.streams.used(rows_ND)

    def _check_finite(self, rows_ND: Tensor, payload: str, exchange: Exchange) -> None:
        if self.settings.check and (wrong := not_finite(rows_ND)):
            self.refuse(payload, wrong, exchange)


def _groups(parts: Parts) -> list[Parts]:
    """Divide messages of one direction into groups; those without rows are left out, since they are not sent."""
    parts = [(exchange, rows_ND) for exchange, rows_ND in parts if len(rows_ND)]
    return [parts[start : start + _GROUP] for start in range(0, len(parts), _GROUP)]


class DeviceAnswer:
    """An answer in progress; see `Answer`. `check` is called before a wait for it."""

    def __init__(
        self, future: Future[tuple[Tensor, Event]], streams: Streams, check: Callable[[], object] = lambda: None
    ):
        self.future, self._streams, self._check = future, streams, check

    def wait(self) -> Tensor:
        """See `Answer.wait`. The host waits only until the receives have been launched."""
        self._check()
        rows_ND, came = self.future.result()
        self._streams.wait(came)
        self._streams.used(rows_ND)
        return rows_ND


@dataclass
class Request:
    """A request of a trunk rank.

    Attributes:
        counts_M: Pinned; filled at `ready`, as the rows are.
        counts_se: The same by shard, once they are known.
    """

    key: RequestKey
    step: int
    rows_ND: Tensor | None
    counts_M: Tensor
    ready: Event
    answer: DeviceAnswer
    counts_se: list[list[int]] = field(default_factory=list)

    def exchange(self, peer: int) -> Exchange:
        return Exchange(peer, self.key, self.step)


class DeviceTrunk(DeviceEnd):
    """A trunk rank's end; see `pool.wire.contract.TrunkWire`."""

    def __init__(self, settings: WireSettings, groups: WireGroups):
        super().__init__(settings, groups)
        self._sending, self._receiving = self.streams.new(), self.streams.new()
        topology = settings.topology
        self._shards = [topology.pool_rank(shard, settings.rank) for shard in range(topology.expert_parallel)]
        self._open: dict[tuple[int, ...], Request] = {}  # requests that have been sent, by the fields of their headers
        self._sent_headers: dict[int, list[Header]] = {}  # the last ones, by lane
        self._sender: Worker[Request] = Worker("sender", self._send, self.watcher)
        self._receiver: Worker[int] = Worker("receiver", self._receive, self.watcher)

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> DeviceAnswer:
        """See `TrunkWire.request`."""
        answer = DeviceAnswer(self.watcher.promise(), self.streams)
        sent_ND = rows_ND.to(self.settings.dtype).contiguous()
        counts_M = self.streams.to_host(tokens_per_expert_M)
        self._sender.put(Request(key, step, sent_ND, counts_M, self.streams.record(), answer))
        return answer

    def _send(self, request: Request) -> None:
        """Launch the sends of a request once it has been computed, then say so."""
        request.ready.synchronize()
        rows_ND, request.rows_ND = request.rows_ND, None  # from here on the watcher keeps them
        assert rows_ND is not None
        request.counts_se = request.counts_M.reshape(-1, self.settings.num_local_experts).tolist()
        sizes = [sum(counts) for counts in request.counts_se]
        exchanges = [request.exchange(peer) for peer in self._shards]
        with self.streams.on(self._sending):
            if self.settings.check:
                self.check_rows(len(rows_ND), sum(sizes), request.key, request.step)
            parts = list(zip(exchanges, rows_ND.split(sizes), strict=True))
            for exchange, rows in parts:
                self._check_finite(rows, "the tokens to", exchange)
            for group in _groups(parts):
                self._launch(self._requests, group, (), "send tokens to")
            self._open[tuple(exchanges[0].fields)] = request
            for header in self._sent_headers.pop(request.key.lane, ()):
                header.wait()  # it has come, since the lane makes its next request
            self._sent_headers[request.key.lane] = [
                self._send_header(exchange, counts, rows, REQUEST_TAG, "send a header to")
                for counts, (exchange, rows) in zip(request.counts_se, parts, strict=True)
            ]
        self._receiver.put(len(sizes))

    def _receive(self, shards: int) -> None:
        """Receive the next answer, of whichever request it is, once the headers of all shards have come."""
        expected = list(self._open.values())[0]  # noqa: RUF015  # an iterator would not let the sender add to it
        doing = "get the answer's header of"
        headers = [self._get_header(expected.exchange(peer), ANSWER_TAG, doing) for peer in self._shards]
        splits = []
        for header in headers:
            header.wait()
            splits.append(self.split(header.message))
            if len(splits) == 1:
                expected = self._open.pop(tuple(splits[0][0]), expected)
            self.check_fields(splits[-1][0], "an answer", expected.exchange(header.exchange.peer))
            self.bytes_received += header.message.nbytes
        sizes = [sum(counts) for counts in expected.counts_se]
        exchanges = [expected.exchange(peer) for peer in self._shards]
        if self.settings.check:
            for exchange, sent, size, (_, served, returned) in zip(
                exchanges, expected.counts_se, sizes, splits, strict=True
            ):
                if wrong := not_conserved(sent, size, served, returned[0]):
                    self.refuse("the answer of", wrong, exchange)
        with self.streams.on(self._receiving):
            rows_ND = self.streams.empty(sum(sizes), self.settings.hidden, dtype=self.settings.dtype)
            parts = list(zip(exchanges, rows_ND.split(sizes), strict=True))
            for group in _groups(parts):
                for work in self._launch(self._answers, (), group, "get the answer of"):
                    work.wait()
            came = self.streams.record()
            if self.settings.check:
                came.synchronize()
                for (exchange, rows), (_, _, returned) in zip(parts, splits, strict=True):
                    if wrong := altered(rows, returned):
                        self.refuse("the answer of", wrong, exchange)
        self.bytes_received += rows_ND.nbytes
        self.watcher.keep_promise(expected.answer.future, (rows_ND, came))


@dataclass(frozen=True)
class Slot:
    """What has come of a slot; `came` is behind all of it."""

    requests: list[tuple[Tensor, Counts]]
    came: Event
    headers_came: float


class DeviceArrived:
    """The requests of a slot; see `Arrived`. They are done when their receives have been launched.

    `check` is called before a wait for their headers, which is before any other.
    """

    def __init__(self, future: Future[Slot], streams: Streams, check: Callable[[], object] = lambda: None):
        self.future, self._streams, self._check = future, streams, check

    @property
    def headers_came(self) -> float:
        """See `Arrived.headers_came`."""
        self._check()
        return self.future.result().headers_came

    def ready(self) -> list[tuple[Tensor, Counts]]:
        """See `Arrived.ready`."""
        slot = self.future.result()
        self._streams.wait(slot.came)
        for rows_ND, counts in slot.requests:
            self._streams.used(rows_ND)
            self._streams.used(counts.rows_e)
        return slot.requests


@dataclass(frozen=True)
class _Coming:
    """A slot that is to be received."""

    exchanges: list[Exchange]
    arrived: DeviceArrived


@dataclass(frozen=True)
class _Answers:
    """Answers of one launch of the experts, which are there at `ready`."""

    parts: list[tuple[Exchange, Tensor]]
    served: list[list[int]]
    ready: Event


class DevicePool(DeviceEnd):
    """A pool rank's end; see `pool.wire.contract.PoolWire`."""

    def __init__(self, settings: WireSettings, groups: WireGroups):
        super().__init__(settings, groups)
        self._sending, self._receiving = self.streams.new(), self.streams.new()
        self._sent_headers: dict[tuple[int, int], Header] = {}  # the last one, by trunk rank and lane
        self._sender: Worker[_Answers] = Worker("sender", self._send, self.watcher)
        self._receiver: Worker[_Coming] = Worker("receiver", self._receive, self.watcher)

    def receive(self, keys: Sequence[RequestKey], step: int) -> DeviceArrived:
        """See `PoolWire.receive`."""
        arrived = DeviceArrived(self.watcher.promise(), self.streams)
        self._receiver.put(_Coming([Exchange(key.trunk_rank, key, step) for key in keys], arrived))
        return arrived

    def _receive(self, coming: _Coming) -> None:
        """Launch the receive of each request of a slot when its header has come."""
        headers = [self._get_header(exchange, REQUEST_TAG, "get a header from") for exchange in coming.exchanges]
        requests = []
        with self.streams.on(self._receiving):
            for header in headers:
                header.wait()
                exchange = header.exchange
                counts, sent = self.check_request(header.message, exchange)
                rows_ND = self.streams.empty(sum(counts), self.settings.hidden, dtype=self.settings.dtype)
                for work in self._launch(self._requests, (), [(exchange, rows_ND)], "get tokens from"):
                    work.wait()
                requests.append((rows_ND, Counts(self.streams.to_device(counts), counts)))
                self.bytes_received += header.message.nbytes + rows_ND.nbytes
                if self.settings.check:
                    self.streams.record().synchronize()
                    if wrong := altered(rows_ND, sent):
                        self.refuse("the tokens of", wrong, exchange)
            slot = Slot(requests, self.streams.record(), time.perf_counter())
        self.watcher.keep_promise(coming.arrived.future, slot)

    def answer(
        self, keys: Sequence[RequestKey], step: int, rows: Sequence[Tensor], served: Sequence[Sequence[int]]
    ) -> None:
        """See `PoolWire.answer`."""
        self.watcher.check()
        exchanges = [Exchange(key.trunk_rank, key, step) for key in keys]
        parts = [(exchange, rows_ND.contiguous()) for exchange, rows_ND in zip(exchanges, rows, strict=True)]
        self._sender.put(_Answers(parts, [list(counts) for counts in served], self.streams.record()))

    def _send(self, answers: _Answers) -> None:
        """Launch the sends of answers once they have been computed, then say so."""
        answers.ready.synchronize()
        with self.streams.on(self._sending):
            for start in range(0, len(answers.parts), _GROUP):
                parts = answers.parts[start : start + _GROUP]
                for exchange, rows_ND in parts:
                    self._check_finite(rows_ND, "the answer to", exchange)
                self._launch(self._answers, parts, (), "send an answer to")
                for (exchange, rows_ND), counts in zip(parts, answers.served[start:], strict=False):
                    place = exchange.peer, exchange.key.lane
                    if place in self._sent_headers:
                        self._sent_headers[place].wait()  # it has come, since the lane has made its next request
                    self._sent_headers[place] = self._send_header(
                        exchange, counts, rows_ND, ANSWER_TAG, "send an answer to"
                    )
