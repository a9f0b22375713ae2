"""The wire: how tokens of one layer travel between a trunk rank and the shards of the pool.

A request consists of a header (kind, step, lane, micro-batch, layer, tokens of each expert of the shard) and a payload
to each shard. The answer is one payload with the same number of rows. Headers travel over a host group (gloo), so that
receive buffers are sized without touching the device. Payloads travel over the lane's own group in the compute dtype;
a shard without tokens gets a header only. No other file passes tokens to process groups.

Every wait has a time limit, and every error names the ranks, the lane, the layer and the micro-batch. With
`WireSettings.check` both ends also check every message, and every answer has a header too (see `pool.wire_check`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import Kind, RequestKey
from pool.topology import Topology
from pool.wire_check import FINGERPRINT_FIELDS, altered, fingerprint, not_conserved, not_finite

_KEY_FIELDS = 5
# Tags of payloads in a lane's own group. A request's header has its lane as tag, an answer's adds the number of lanes.
_REQUEST_TAG, _ANSWER_TAG = 1, 2


class WireError(RuntimeError):
    """A message did not arrive, or was not the one in the schedule."""


@dataclass(frozen=True)
class WireSettings:
    """What both ends of the wire agree on.

    Attributes:
        topology: The grid of ranks.
        rank: World rank of this process.
        num_local_experts: Experts of a shard (e).
        hidden: Row length D.
        dtype: Payload dtype.
        device: Where tokens are computed.
        payload_device: Where the lane groups take their buffers from ("cpu" for gloo).
        timeout: Longest wait for one message.
        check: Whether to check every message: headers in both directions, finite payloads, checksums, and that tokens
            sent = served = returned.
    """

    topology: Topology
    rank: int
    num_local_experts: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    payload_device: torch.device
    timeout: timedelta
    check: bool = False


@dataclass(frozen=True)
class _Exchange:
    """A request and its answer, between this rank and a peer."""

    peer: int
    key: RequestKey
    step: int

    @property
    def fields(self) -> list[int]:
        """The first fields of a header."""
        return [self.key.kind, self.step, self.key.lane, self.key.micro_batch, self.key.layer]

    def __str__(self) -> str:
        k = self.key
        return f"{k.kind.name}, lane {k.lane}, layer {k.layer}, micro-batch {k.micro_batch}, step {self.step}"


@dataclass(frozen=True)
class _Transfer:
    """A send or receive in progress. It keeps its message alive, and names the exchange in errors."""

    wire: _Wire
    work: Any
    message: Tensor
    doing: str
    exchange: _Exchange

    def wait(self) -> None:
        with self.wire.naming(self.doing, self.exchange):
            self.work.wait(self.wire.settings.timeout)


class _Wire:
    """What both ends share: the groups, named errors, headers, buffers.

    Args:
        settings: See `WireSettings`.
        host_group: A gloo process group over all ranks, for headers.
        lane_groups: One process group over all ranks per lane, for payloads.

    Attributes:
        bytes_sent, bytes_received: Headers and payloads since the start.
    """

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        self.settings = settings
        self.bytes_sent = self.bytes_received = 0
        self._host = host_group
        self._lanes = lane_groups

    def _start(
        self,
        operation: Callable[[list[Tensor], int, int], Any],
        message: Tensor,
        tag: int,
        doing: str,
        exchange: _Exchange,
    ) -> _Transfer:
        """Start a send or receive of a group. If the peer is known to be gone, this fails at once."""
        with self.naming(doing, exchange):
            return _Transfer(self, operation([message], exchange.peer, tag), message, doing, exchange)

    @contextmanager
    def naming(self, doing: str, exchange: _Exchange) -> Iterator[None]:
        """Turn an error of a process group into a WireError that names the exchange."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            limit = self.settings.timeout.total_seconds()
            how = f"within {limit:g} s" if "imed out" in reason else "because the connection broke"
            raise WireError(
                f"{self._me} could not {doing} {self._name(exchange.peer)} {how}: {exchange} ({reason})"
            ) from error

    def _header(self, exchange: _Exchange, counts_e: Tensor, rows_ND: Tensor, payload: str) -> Tensor:
        """Return the header for this payload, which errors call `payload` ("the answer to")."""
        parts = [torch.tensor(exchange.fields), counts_e]
        if self.settings.check:
            if wrong := not_finite(rows_ND):
                self._refuse(payload, wrong, exchange)
            parts.append(torch.tensor(fingerprint(rows_ND)))
        return torch.cat(parts)

    def _header_buffer(self) -> Tensor:
        extra = FINGERPRINT_FIELDS if self.settings.check else 0
        return torch.empty(_KEY_FIELDS + self.settings.num_local_experts + extra, dtype=torch.int64)

    def _split(self, header: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Split a header into (fields, tokens of each expert, fingerprint)."""
        counts_end = _KEY_FIELDS + self.settings.num_local_experts
        values = header.tolist()
        return values[:_KEY_FIELDS], values[_KEY_FIELDS:counts_end], values[counts_end:]

    def _check_fields(self, got: list[int], message: str, exchange: _Exchange) -> None:
        """Check that a header's fields are those of the schedule."""
        if got == exchange.fields:
            return
        kind, step, lane, micro_batch, layer = got
        name = Kind(kind).name if kind in list(Kind) else f"kind {kind}"
        raise WireError(
            f"{self._me} got {message} that does not match the schedule from {self._name(exchange.peer)}: "
            f"{name}, lane {lane}, layer {layer}, micro-batch {micro_batch}, step {step}; the schedule has {exchange}"
        )

    def _refuse(self, payload: str, wrong: str, exchange: _Exchange) -> NoReturn:
        raise WireError(f"{self._me} checked {payload} {self._name(exchange.peer)}: {wrong}: {exchange}")

    def _payload_buffer(self, rows: int) -> Tensor:
        s = self.settings
        return torch.empty(rows, s.hidden, dtype=s.dtype, device=s.payload_device)

    def _answer_tag(self, key: RequestKey) -> int:
        return len(self._lanes) + key.lane

    def _name(self, rank: int) -> str:
        return self.settings.topology.describe(rank)

    @property
    def _me(self) -> str:
        return self._name(self.settings.rank)


@dataclass(frozen=True)
class _CheckedPart:
    """A shard's part of an answer with `WireSettings.check`: its header arrives before its rows are received."""

    exchange: _Exchange
    sent_header: Tensor
    header: Tensor
    rows_ND: Tensor


class Answer:
    """An answer in progress, which keeps all buffers until `wait`."""

    def __init__(self, rows_ND: Tensor, wire: TrunkWire):
        self._rows_ND, self._wire = rows_ND, wire
        self.transfers: list[_Transfer] = []
        self.checked_parts: list[_CheckedPart] = []

    def wait(self) -> Tensor:
        """Return the answer's rows (N, D), in the order of the request's, on the compute device."""
        for transfer in self.transfers:
            transfer.wait()
        self._wire.receive_checked(self.checked_parts)
        self.transfers.clear()
        return self._rows_ND.to(self._wire.settings.device)


class TrunkWire(_Wire):
    """A trunk rank's end of the wire."""

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> Answer:
        """Send a request to every shard, and start receiving its answer.

        Args:
            rows_ND: Tokens (forward) or output gradients (backward), expert-major over the whole pool.
            tokens_per_expert_M: Rows of each expert, in shard-major order, on the compute device.
        """
        s = self.settings
        counts_se = tokens_per_expert_M.cpu().reshape(-1, s.num_local_experts)
        sizes = counts_se.sum(1).tolist()
        sent_ND = rows_ND.to(s.payload_device, s.dtype).contiguous()
        if s.check and sum(sizes) != len(sent_ND):
            raise WireError(
                f"{self._me} made a request of {len(sent_ND)} rows with token counts of {sum(sizes)}: "
                f"{_Exchange(s.rank, key, step)}"
            )
        answer_ND = self._payload_buffer(sent_ND.shape[0])
        lane = self._lanes[key.lane]
        answer = Answer(answer_ND, self)
        shards = zip(counts_se, sent_ND.split(sizes), answer_ND.split(sizes), strict=True)
        for shard, (counts_e, rows, answer_rows) in enumerate(shards):
            exchange = _Exchange(s.topology.pool_rank(shard, key.trunk_rank), key, step)
            header = self._header(exchange, counts_e, rows, "the tokens to")
            messages = [(self._host.send, header, key.lane, "send a header to")]
            if len(rows):
                messages.append((lane.send, rows, _REQUEST_TAG, "send tokens to"))
            if s.check:
                part = _CheckedPart(exchange, header, self._header_buffer(), answer_rows)
                answer.checked_parts.append(part)
                messages.append((self._host.recv, part.header, self._answer_tag(key), "get the answer's header of"))
            elif len(rows):
                messages.append((lane.recv, answer_rows, _ANSWER_TAG, "get the answer of"))
            self.bytes_sent += header.nbytes + rows.nbytes
            self.bytes_received += answer_rows.nbytes + (header.nbytes if s.check else 0)
            answer.transfers += [self._start(*message, exchange) for message in messages]
        return answer

    def receive_checked(self, parts: Sequence[_CheckedPart]) -> None:
        """Check the headers of an answer's parts, which have arrived, then receive the parts and check them too."""
        receiving = []
        for part in parts:
            fields, served_e, returned = self._split(part.header)
            _, sent_e, sent = self._split(part.sent_header)
            self._check_fields(fields, "an answer", part.exchange)
            if wrong := not_conserved(sent_e, sent[0], served_e, returned[0]):
                self._refuse("the answer of", wrong, part.exchange)
            if len(part.rows_ND):
                receive = self._lanes[part.exchange.key.lane].recv
                transfer = self._start(receive, part.rows_ND, _ANSWER_TAG, "get the answer of", part.exchange)
                receiving.append((transfer, returned))
        for transfer, returned in receiving:
            transfer.wait()
            if wrong := altered(transfer.message, returned):
                self._refuse("the answer of", wrong, transfer.exchange)


class PoolWire(_Wire):
    """A pool rank's end of the wire.

    Attributes:
        headers_came: When the last headers that `receive` waited for had arrived, by `time.perf_counter`.
    """

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        super().__init__(settings, host_group, lane_groups)
        self.headers_came = 0.0
        self._sending: dict[tuple[int, int], list[_Transfer]] = {}
        if settings.payload_device.type == "cuda":
            self._receive_stream = torch.cuda.Stream(settings.device)

    def receive(self, keys: Sequence[RequestKey], step: int) -> list[tuple[Tensor, Counts]]:
        """Receive the requests of one slot.

        Returns:
            For each key its rows (n, D), and how many each local expert gets.

        Raises:
            WireError: A message did not arrive in time, its sender is gone, or it is not the one in the schedule.
        """
        exchanges = [_Exchange(key.trunk_rank, key, step) for key in keys]
        headers = [
            self._start(self._host.recv, self._header_buffer(), e.key.lane, "get a header from", e) for e in exchanges
        ]
        received: list[tuple[Tensor, list[int]]] = []
        receiving: list[tuple[_Transfer, list[int]]] = []
        for header in headers:
            header.wait()
            counts, sent = self._check_request(header)
            rows_ND = self._payload_buffer(sum(counts))
            self.bytes_received += header.message.nbytes + rows_ND.nbytes
            received.append((rows_ND, counts))
            if len(rows_ND):
                receive = self._lanes[header.exchange.key.lane].recv
                transfer = self._start(receive, rows_ND, _REQUEST_TAG, "get tokens from", header.exchange)
                receiving.append((transfer, sent))
        self.headers_came = time.perf_counter()
        for transfer, sent in receiving:
            transfer.wait()
            if sent and (wrong := altered(transfer.message, sent)):
                self._refuse("the tokens of", wrong, transfer.exchange)
        device = self.settings.device
        return [(rows_ND.to(device), Counts.of(c, device)) for rows_ND, c in received]

    def receive_in_thread(self, keys: Sequence[RequestKey], step: int) -> tuple[list[tuple[Tensor, Counts]], float]:
        """`receive` in a thread beside the computing one; also returns when the headers had arrived.

        On a GPU the waits use a stream of their own, for which the host waits. On the computing stream they would hold
        up work whose answers the awaited requests may depend on.
        """
        if self.settings.payload_device.type != "cuda":
            return self.receive(keys, step), self.headers_came
        with torch.cuda.device(self.settings.device), torch.cuda.stream(self._receive_stream):
            requests = self.receive(keys, step)
            self._receive_stream.synchronize()
        for rows_ND, _ in requests:
            rows_ND.record_stream(torch.cuda.default_stream(self.settings.device))
        return requests, self.headers_came

    def answer(self, key: RequestKey, step: int, rows_ND: Tensor, served_e: Sequence[int]) -> None:
        """Send the answer of a request, and return at once.

        The rows are kept until the next answer to the same lane of the same trunk rank, which cannot make a request
        before it has them.

        Args:
            served_e: Tokens of each local expert that were served.
        """
        for transfer in self._sending.pop((key.trunk_rank, key.lane), []):
            transfer.wait()
        exchange = _Exchange(key.trunk_rank, key, step)
        rows_ND = rows_ND.to(self.settings.payload_device).contiguous()
        messages = []
        if self.settings.check:
            header = self._header(exchange, torch.tensor(served_e), rows_ND, "the answer to")
            messages.append((self._host.send, header, self._answer_tag(key)))
        if len(rows_ND):
            messages.append((self._lanes[key.lane].send, rows_ND, _ANSWER_TAG))
        self.bytes_sent += sum(message.nbytes for _, message, _ in messages)
        self._sending[key.trunk_rank, key.lane] = [
            self._start(*message, "send an answer to", exchange) for message in messages
        ]

    def _check_request(self, header: _Transfer) -> tuple[list[int], list[int]]:
        """Check the header of a request; return the tokens of each local expert, and the fingerprint of its payload."""
        fields, counts, sent = self._split(header.message)
        exchange = header.exchange
        self._check_fields(fields, "a request", exchange)
        if min(counts, default=0) < 0:
            raise WireError(f"{self._me} got negative token counts from {self._name(exchange.peer)}: {exchange}")
        if sent and sent[0] != sum(counts):
            wrong = f"{sent[0]} rows were sent with token counts of {sum(counts)}"
            self._refuse("the header of", wrong, exchange)
        return counts, sent
