"""Payloads in host memory: the transport over gloo, with a group per lane.

The receive of an answer is posted together with its request, so that its rows need no header. The peer's socket holds
what it has not received yet. Where ranks have both roles, a pair of them uses the same groups in both directions:
requests and answers have tags of their own. What such a rank sends to itself goes through a `Loopback`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import RequestKey
from pool.wire.check import altered, fingerprint, not_conserved, not_finite
from pool.wire.contract import End, Exchange, WireGroups, WireSettings
from pool.wire.loopback import Loopback, Message

# Tags of payloads in a lane's own group. A request's header has its lane as tag, an answer's adds the number of lanes.
_REQUEST_TAG, _ANSWER_TAG = 1, 2


@dataclass(frozen=True)
class _Transfer:
    """A send or receive in progress. It keeps its message alive, and names the exchange in errors."""

    end: _HostEnd
    work: Any
    message: Tensor
    doing: str
    exchange: Exchange

    def wait(self) -> None:
        with self.end.naming(self.doing, self.exchange):
            self.work.wait(self.end.limit)


class _HostEnd(End):
    """What both ends share: the groups and buffers.

    Args:
        loopback: What this rank sends to itself; the same for both ends of a rank that has both.
    """

    def __init__(self, settings: WireSettings, groups: WireGroups, loopback: Loopback | None = None):
        super().__init__(settings)
        self._host, self._lanes = groups.host, groups.lanes
        self._loopback = loopback or Loopback()

    def _is_own(self, exchange: Exchange) -> bool:
        return exchange.peer == self.settings.rank

    def _start(
        self,
        operation: Callable[[list[Tensor], int, int], Any],
        message: Tensor,
        tag: int,
        doing: str,
        exchange: Exchange,
    ) -> _Transfer:
        """Start a send or receive of a group. If the peer is known to be gone, this fails at once."""
        with self.naming(doing, exchange):
            return _Transfer(self, operation([message], exchange.peer, tag), message, doing, exchange)

    def _header(self, exchange: Exchange, counts_e: Tensor, rows_ND: Tensor, payload: str) -> Tensor:
        """Return the header for this payload, which errors call `payload` ("the answer to")."""
        parts = [torch.tensor(exchange.fields), counts_e]
        if self.settings.check:
            if wrong := not_finite(rows_ND):
                self.refuse(payload, wrong, exchange)
            parts.append(torch.tensor(fingerprint(rows_ND)))
        return torch.cat(parts)

    def _payload_buffer(self, rows: int) -> Tensor:
        s = self.settings
        return torch.empty(rows, s.hidden, dtype=s.dtype, device=s.payload_device)

    def _answer_tag(self, key: RequestKey) -> int:
        return len(self._lanes) + key.lane

    def settle(self) -> None:
        """See `TrunkWire.settle`. Every message that this end receives is waited for where it is used."""


@dataclass(frozen=True)
class _CheckedPart:
    """A shard's part of an answer with `WireSettings.check`: its header arrives before its rows are received."""

    exchange: Exchange
    sent_header: Tensor
    header: Tensor
    rows_ND: Tensor


@dataclass(frozen=True)
class _OwnPart:
    """The part of an answer that comes from this rank's own shard, and where it goes."""

    exchange: Exchange
    sent_header: Tensor
    rows_ND: Tensor


class HostAnswer:
    """An answer in progress, which keeps all buffers until `wait`."""

    def __init__(self, rows_ND: Tensor, end: HostTrunk):
        self._rows_ND, self._end = rows_ND, end
        self.transfers: list[_Transfer] = []
        self.checked_parts: list[_CheckedPart] = []
        self.own_part: _OwnPart | None = None
        self._future: Future[None] | None = None

    @property
    def future(self) -> Future[None]:
        """See `Answer.future`. gloo says only by a wait whether a message has come, so a thread waits."""
        self._future = self._future or self._end.waiter.submit(self._receive)
        return self._future

    def _receive(self) -> None:
        """Receive what comes from other ranks."""
        for transfer in self.transfers:
            transfer.wait()
        self._end.receive_checked(self.checked_parts)
        self.transfers.clear()

    def wait(self) -> Tensor:
        """See `Answer.wait`."""
        if self._future:
            self._future.result()
        else:
            self._receive()
        if self.own_part:
            own_ND = self._end.take_own(self.own_part)
            if len(own_ND) == len(self._rows_ND):
                self._rows_ND = own_ND  # nothing comes from elsewhere
            else:
                self.own_part.rows_ND.copy_(own_ND)
        return self._rows_ND.to(self._end.settings.device)


class HostTrunk(_HostEnd):
    """A trunk rank's end; see `pool.wire.contract.TrunkWire`.

    Attributes:
        waiter: Waits for answers while the computing thread has something else to do.
    """

    def __init__(self, settings: WireSettings, groups: WireGroups, loopback: Loopback | None = None):
        super().__init__(settings, groups, loopback)
        self.waiter = ThreadPoolExecutor(1, "waiter")

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> HostAnswer:
        """See `TrunkWire.request`."""
        s = self.settings
        counts_se = tokens_per_expert_M.cpu().reshape(-1, s.num_local_experts)
        sizes = counts_se.sum(1).tolist()
        sent_ND = rows_ND.to(s.payload_device, s.dtype).contiguous()
        if s.check:
            self.check_rows(len(sent_ND), sum(sizes), key, step)
        answer_ND = self._payload_buffer(sent_ND.shape[0])
        lane = self._lanes[key.lane]
        answer = HostAnswer(answer_ND, self)
        shards = zip(counts_se, sent_ND.split(sizes), answer_ND.split(sizes), strict=True)
        for shard, (counts_e, rows, answer_rows) in enumerate(shards):
            exchange = Exchange(s.topology.pool_rank(shard, key.trunk_rank), key, step)
            header = self._header(exchange, counts_e, rows, "the tokens to")
            if self._is_own(exchange):
                # The pool keeps these rows until the backward; a view would keep all of the request's.
                kept_ND = rows if len(rows) == len(sent_ND) else rows.clone()
                self._loopback.put_request(exchange, Message(header, kept_ND))
                answer.own_part = _OwnPart(exchange, header, answer_rows)
                continue
            messages = [(self._host.send, header, key.lane, "send a header to")]
            if len(rows):
                messages.append((lane.send, rows, _REQUEST_TAG, "send tokens to"))
            if s.check:
                part = _CheckedPart(exchange, header, self.header_buffer(), answer_rows)
                answer.checked_parts.append(part)
                messages.append((self._host.recv, part.header, self._answer_tag(key), "get the answer's header of"))
            elif len(rows):
                messages.append((lane.recv, answer_rows, _ANSWER_TAG, "get the answer of"))
            self.bytes_sent += header.nbytes + rows.nbytes
            self.bytes_received += answer_rows.nbytes + (header.nbytes if s.check else 0)
            answer.transfers += [self._start(*message, exchange) for message in messages]
        return answer

    def take_own(self, part: _OwnPart) -> Tensor:
        """Return the part of an answer that this rank has served, after the same checks as of other parts."""
        answer = self._loopback.take_answer(part.exchange, self)
        if answer.header is not None:
            returned = self._check_conserved(answer.header, part.sent_header, part.exchange)
            if wrong := altered(answer.rows_ND, returned):
                self.refuse("the answer of", wrong, part.exchange)
        return answer.rows_ND

    def _check_conserved(self, header: Tensor, sent_header: Tensor, exchange: Exchange) -> list[int]:
        """Check the header of an answer against that of its request; return the fingerprint of its payload."""
        fields, served_e, returned = self.split(header)
        _, sent_e, sent = self.split(sent_header)
        self.check_fields(fields, "an answer", exchange)
        if wrong := not_conserved(sent_e, sent[0], served_e, returned[0]):
            self.refuse("the answer of", wrong, exchange)
        return returned

    def receive_checked(self, parts: Sequence[_CheckedPart]) -> None:
        """Check the headers of an answer's parts, which have arrived, then receive the parts and check them too."""
        receiving = []
        for part in parts:
            returned = self._check_conserved(part.header, part.sent_header, part.exchange)
            if len(part.rows_ND):
                receive = self._lanes[part.exchange.key.lane].recv
                transfer = self._start(receive, part.rows_ND, _ANSWER_TAG, "get the answer of", part.exchange)
                receiving.append((transfer, returned))
        for transfer, returned in receiving:
            transfer.wait()
            if wrong := altered(transfer.message, returned):
                self.refuse("the answer of", wrong, transfer.exchange)


@dataclass(frozen=True)
class _Slot:
    """The requests of a slot that have arrived, without this rank's own."""

    requests: dict[Exchange, tuple[Tensor, Counts]]
    headers_came: float


class HostArrived:
    """The requests of a slot; see `Arrived`."""

    def __init__(self, exchanges: Sequence[Exchange], future: Future[_Slot], end: HostPool):
        self._exchanges, self.future, self._end = exchanges, future, end

    @property
    def headers_came(self) -> float:
        """See `Arrived.headers_came`."""
        return self.future.result().headers_came

    def ready(self) -> list[tuple[Tensor, Counts]]:
        """See `Arrived.ready`."""
        came = self.future.result().requests
        return [came[e] if e in came else self._end.take_own(e) for e in self._exchanges]


class HostPool(_HostEnd):
    """A pool rank's end; see `pool.wire.contract.PoolWire`."""

    def __init__(self, settings: WireSettings, groups: WireGroups, loopback: Loopback | None = None):
        super().__init__(settings, groups, loopback)
        self._receiver = ThreadPoolExecutor(1, "receiver")
        self._sending: dict[tuple[int, int], list[_Transfer]] = {}

    def receive(self, keys: Sequence[RequestKey], step: int) -> HostArrived:
        """See `PoolWire.receive`."""
        exchanges = [Exchange(key.trunk_rank, key, step) for key in keys]
        coming = [exchange for exchange in exchanges if not self._is_own(exchange)]
        return HostArrived(exchanges, self._receiver.submit(self._receive, coming), self)

    def take_own(self, exchange: Exchange) -> tuple[Tensor, Counts]:
        """Return a request of this rank itself, after the same checks as of other requests."""
        request = self._loopback.take_request(exchange, self)
        assert request.header is not None
        counts, sent = self.check_request(request.header, exchange)
        if sent and (wrong := altered(request.rows_ND, sent)):
            self.refuse("the tokens of", wrong, exchange)
        return request.rows_ND.to(self.settings.device), Counts.of(counts, self.settings.device)

    def _receive(self, exchanges: Sequence[Exchange]) -> _Slot:
        headers = [
            self._start(self._host.recv, self.header_buffer(), e.key.lane, "get a header from", e) for e in exchanges
        ]
        received: dict[Exchange, tuple[Tensor, Counts]] = {}
        receiving: list[tuple[_Transfer, list[int]]] = []
        for header in headers:
            header.wait()
            counts, sent = self.check_request(header.message, header.exchange)
            rows_ND = self._payload_buffer(sum(counts))
            self.bytes_received += header.message.nbytes + rows_ND.nbytes
            received[header.exchange] = (rows_ND, Counts.of(counts, self.settings.device))
            if len(rows_ND):
                receive = self._lanes[header.exchange.key.lane].recv
                transfer = self._start(receive, rows_ND, _REQUEST_TAG, "get tokens from", header.exchange)
                receiving.append((transfer, sent))
        headers_came = time.perf_counter()
        for transfer, sent in receiving:
            transfer.wait()
            if sent and (wrong := altered(transfer.message, sent)):
                self.refuse("the tokens of", wrong, transfer.exchange)
        on_device = {e: (rows_ND.to(self.settings.device), counts) for e, (rows_ND, counts) in received.items()}
        return _Slot(on_device, headers_came)

    def settle(self) -> None:
        """See `PoolWire.settle`. Wait for the last answers to be sent; the trunk ranks need nothing more to take them.

        When a send is waited for, c10d marks the end of its event in torch's profiler (Work.cpp). If the profiler has
        stopped meanwhile, that writes into memory which has been freed.
        """
        for transfer in (transfer for transfers in self._sending.values() for transfer in transfers):
            transfer.wait()
        self._sending.clear()

    def stop(self) -> None:
        """See `PoolWire.stop`. The thread is not waited for: its message may never arrive."""
        self._receiver.shutdown(wait=False, cancel_futures=True)

    def answer(
        self, keys: Sequence[RequestKey], step: int, rows: Sequence[Tensor], served: Sequence[Sequence[int]]
    ) -> None:
        """See `PoolWire.answer`."""
        for key, rows_ND, counts in zip(keys, rows, served, strict=True):
            self._answer(key, step, rows_ND, counts)

    def _answer(self, key: RequestKey, step: int, rows_ND: Tensor, served_e: Sequence[int]) -> None:
        """Send an answer.

        The rows are kept until the next answer to the same lane of the same trunk rank, which cannot make a request
        before it has them.
        """
        for transfer in self._sending.pop((key.trunk_rank, key.lane), []):
            transfer.wait()
        exchange = Exchange(key.trunk_rank, key, step)
        rows_ND = rows_ND.to(self.settings.payload_device).contiguous()
        messages, header = [], None
        if self.settings.check:
            header = self._header(exchange, torch.tensor(served_e), rows_ND, "the answer to")
        if self._is_own(exchange):
            self._loopback.put_answer(exchange, Message(header, rows_ND))
            return
        if header is not None:
            messages.append((self._host.send, header, self._answer_tag(key)))
        if len(rows_ND):
            messages.append((self._lanes[key.lane].send, rows_ND, _ANSWER_TAG))
        self.bytes_sent += sum(message.nbytes for _, message, _ in messages)
        self._sending[key.trunk_rank, key.lane] = [
            self._start(*message, "send an answer to", exchange) for message in messages
        ]
