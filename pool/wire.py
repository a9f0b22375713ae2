"""The wire: how tokens of one layer travel between a trunk rank and the shards of the pool.

A request is a header (kind, step, lane, micro-batch, layer, tokens of each expert of the shard) and a payload to each
shard; the answer is one payload back, of the same number of rows. Headers go over a host group (gloo), so that receive
buffers are sized without touching the device; payloads go over the lane's own group in the compute dtype. A shard
without tokens gets the header only. Only this file talks to process groups about tokens.

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

from pool.schedule import Kind, RequestKey
from pool.topology import Topology
from pool.wire_check import SEAL_FIELDS, altered, not_conserved, not_finite, seal

_HEADER_FIELDS = 5
# Of payloads, in a lane's own group. A request's header has its lane as tag; an answer's the number of lanes more.
_REQUEST_TAG, _ANSWER_TAG = 1, 2


class WireError(RuntimeError):
    """A message did not come, or was not the one that the plan asks for."""


@dataclass(frozen=True)
class WireSettings:
    """What both sides of the wire agree on.

    Attributes:
        topology: the grid of ranks.
        rank: this process's world rank.
        num_local_experts: experts of a shard (e).
        hidden: row length D.
        dtype: payload dtype.
        device: where tokens are computed.
        payload_device: where the lane groups take their buffers ("cpu" for gloo).
        timeout: longest wait for one message.
        check: check every message: headers both ways, finite payloads, checksums, tokens sent = served = returned.
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


class _Wire:
    """What both ends share: the groups, named waits, buffers.

    Args:
        settings: see `WireSettings`.
        host_group: gloo process group over all ranks, for headers.
        lane_groups: one process group over all ranks a lane, for payloads.
    Attributes:
        bytes_sent, bytes_received: headers and payloads since the start.
    """

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        self.settings = settings
        self.bytes_sent = self.bytes_received = 0
        self._host = host_group
        self._lanes = lane_groups

    def _post(
        self,
        operation: Callable[[list[Tensor], int, int], Any],
        message: Tensor,
        tag: int,
        doing: str,
        peer: int,
        key: RequestKey,
        step: int,
    ) -> Any:
        """Start a send or receive of a group. A peer known to be gone is an error here already, not in the wait."""
        with self._naming(doing, peer, key, step):
            return operation([message], peer, tag)

    def _wait(self, work: Any, doing: str, peer: int, key: RequestKey, step: int) -> None:
        with self._naming(doing, peer, key, step):
            work.wait(self.settings.timeout)

    @contextmanager
    def _naming(self, doing: str, peer: int, key: RequestKey, step: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            limit = self.settings.timeout.total_seconds()
            how = f"within {limit:g} s" if "imed out" in reason else "because the connection broke"
            raise WireError(
                f"{self._me} could not {doing} {self._name(peer)} {how}: {_describe(key, step)} ({reason})"
            ) from error

    def _header(self, key: RequestKey, step: int, counts_e: Tensor, rows_ND: Tensor, peer: int, payload: str) -> Tensor:
        """Header of a message with this payload, which is named in errors ("the answer to")."""
        fields = torch.tensor([key.kind, step, key.lane, key.micro_batch, key.layer])
        if not self.settings.check:
            return torch.cat((fields, counts_e))
        if wrong := not_finite(rows_ND):
            self._refuse(payload, wrong, peer, key, step)
        return torch.cat((fields, counts_e, torch.tensor(seal(rows_ND))))

    def _header_buffer(self) -> Tensor:
        seal_fields = SEAL_FIELDS if self.settings.check else 0
        return torch.empty(_HEADER_FIELDS + self.settings.num_local_experts + seal_fields, dtype=torch.int64)

    def _split(self, header: Tensor) -> tuple[list[int], list[int], list[int]]:
        """(fields, tokens of each expert, seal) of a header."""
        counts_end = _HEADER_FIELDS + self.settings.num_local_experts
        values = header.tolist()
        return values[:_HEADER_FIELDS], values[_HEADER_FIELDS:counts_end], values[counts_end:]

    def _check_fields(self, got: list[int], message: str, key: RequestKey, step: int, peer: int) -> None:
        """Whether a header's fields are those that the plan has."""
        if got == [key.kind, step, key.lane, key.micro_batch, key.layer]:
            return
        kind, got_step, lane, micro_batch, layer = got
        name = Kind(kind).name if kind in list(Kind) else f"kind {kind}"
        raise WireError(
            f"{self._me} got {message} that does not fit the plan from {self._name(peer)}: "
            f"{name}, lane {lane}, layer {layer}, micro-batch {micro_batch}, step {got_step}; "
            f"the plan has {_describe(key, step)}"
        )

    def _refuse(self, payload: str, wrong: str, peer: int, key: RequestKey, step: int) -> NoReturn:
        raise WireError(f"{self._me} checked {payload} {self._name(peer)}: {wrong}: {_describe(key, step)}")

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
class _Due:
    """A shard's part of an answer, with `WireSettings.check`: its header comes first, and says whether to take it."""

    shard_rank: int
    sent_header: Tensor
    header: Tensor
    rows_ND: Tensor


class Answer:
    """An answer under way: holds the buffers until `wait`."""

    def __init__(self, rows_ND: Tensor, wire: TrunkWire, key: RequestKey, step: int):
        self._rows_ND = rows_ND
        self._wire = wire
        self._key = key
        self._step = step
        self.waits: list[tuple[Any, str, int]] = []
        self.due: list[_Due] = []
        self.sent: list[Tensor] = []

    def wait(self) -> Tensor:
        """The answer's rows (N, D), in the order of the request's, on the compute device."""
        for work, doing, peer in self.waits:
            self._wire._wait(work, doing, peer, self._key, self._step)
        self._wire.take_checked(self.due, self._key, self._step)
        self.sent.clear()
        return self._rows_ND.to(self._wire.settings.device)


class TrunkWire(_Wire):
    """A trunk rank's end of the wire."""

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> Answer:
        """Send a request to every shard and post the receive of its answer.

        Args:
            rows_ND: tokens (forward) or output gradients (backward), expert-major over the whole pool.
            tokens_per_expert_M: rows of each expert, in shard-major order, on the host.
        """
        s = self.settings
        counts_se = tokens_per_expert_M.reshape(-1, s.num_local_experts)
        sizes = counts_se.sum(1).tolist()
        sent_ND = rows_ND.to(s.payload_device, s.dtype).contiguous()
        if s.check and sum(sizes) != len(sent_ND):
            raise WireError(
                f"{self._me} made a request of {len(sent_ND)} rows with token counts of {sum(sizes)}: "
                f"{_describe(key, step)}"
            )
        answer_ND = self._payload_buffer(sent_ND.shape[0])
        lane = self._lanes[key.lane]
        answer = Answer(answer_ND, self, key, step)
        start = 0
        for shard, (size, counts_e) in enumerate(zip(sizes, counts_se, strict=True)):
            peer = s.topology.pool_rank(shard, key.trunk_rank)
            rows, answer_rows = sent_ND[start : start + size], answer_ND[start : start + size]
            header = self._header(key, step, counts_e, rows, peer, "the tokens to")
            answer.sent.append(header)
            messages = [(self._host.send, header, key.lane, "send a header to")]
            if size:
                answer.sent.append(rows)
                messages.append((lane.send, rows, _REQUEST_TAG, "send tokens to"))
            if s.check:
                due = _Due(peer, header, self._header_buffer(), answer_rows)
                answer.due.append(due)
                messages.append((self._host.recv, due.header, self._answer_tag(key), "get the answer's header of"))
            elif size:
                messages.append((lane.recv, answer_rows, _ANSWER_TAG, "get the answer of"))
            self.bytes_sent += header.nbytes + rows.nbytes
            self.bytes_received += answer_rows.nbytes + (header.nbytes if s.check else 0)
            for operation, message, tag, doing in messages:
                answer.waits.append((self._post(operation, message, tag, doing, peer, key, step), doing, peer))
            start += size
        return answer

    def take_checked(self, due: Sequence[_Due], key: RequestKey, step: int) -> None:
        """Check the headers of an answer's parts, which have come, then receive the parts and check them too."""
        works = []
        for part in due:
            fields, served_e, sealed = self._split(part.header)
            _, sent_e, (rows_sent, _) = self._split(part.sent_header)
            self._check_fields(fields, "an answer", key, step, part.shard_rank)
            if wrong := not_conserved(sent_e, rows_sent, served_e, sealed[0]):
                self._refuse("the answer of", wrong, part.shard_rank, key, step)
            if len(part.rows_ND):
                receive, doing = self._lanes[key.lane].recv, "get the answer of"
                work = self._post(receive, part.rows_ND, _ANSWER_TAG, doing, part.shard_rank, key, step)
                works.append((part, work, sealed))
        for part, work, sealed in works:
            self._wait(work, "get the answer of", part.shard_rank, key, step)
            if wrong := altered(part.rows_ND, sealed):
                self._refuse("the answer of", wrong, part.shard_rank, key, step)


class PoolWire(_Wire):
    """A pool rank's end of the wire.

    Attributes:
        headers_came: when the last headers that `receive` waited for had come, by `time.perf_counter`.
    """

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        super().__init__(settings, host_group, lane_groups)
        self.headers_came = 0.0
        self._sending: dict[tuple[int, int], tuple[list[Any], list[Tensor], RequestKey, int]] = {}
        if settings.payload_device.type == "cuda":
            self._receive_stream = torch.cuda.Stream(settings.device)

    def receive(self, keys: Sequence[RequestKey], step: int) -> list[tuple[Tensor, list[int]]]:
        """Receive the requests of one slot: for each key its rows (n, D) and the tokens of each local expert.

        Raises:
            WireError: a message did not come in time, its sender is gone, or it is not what the plan says.
        """
        headers = [self._header_buffer() for _ in keys]
        posted = [
            self._post(self._host.recv, h, k.lane, "get a header from", k.trunk_rank, k, step)
            for h, k in zip(headers, keys, strict=True)
        ]
        received: list[tuple[Tensor, list[int]]] = []
        works: list[tuple[RequestKey, Any, Tensor, list[int]]] = []
        for key, header, work in zip(keys, headers, posted, strict=True):
            self._wait(work, "get a header from", key.trunk_rank, key, step)
            counts, sealed = self._check(header, key, step)
            rows_ND = self._payload_buffer(sum(counts))
            self.bytes_received += header.nbytes + rows_ND.nbytes
            received.append((rows_ND, counts))
            if len(rows_ND):
                receive = self._lanes[key.lane].recv
                work = self._post(receive, rows_ND, _REQUEST_TAG, "get tokens from", key.trunk_rank, key, step)
                works.append((key, work, rows_ND, sealed))
        self.headers_came = time.perf_counter()
        for key, work, rows_ND, sealed in works:
            self._wait(work, "get tokens from", key.trunk_rank, key, step)
            if sealed and (wrong := altered(rows_ND, sealed)):
                self._refuse("the tokens of", wrong, key.trunk_rank, key, step)
        return [(rows_ND.to(self.settings.device), counts) for rows_ND, counts in received]

    def receive_in_thread(self, keys: Sequence[RequestKey], step: int) -> tuple[list[tuple[Tensor, list[int]]], float]:
        """`receive` in a thread beside the computing one, and when the headers had come.

        On a GPU the waits go to a stream of their own, and the host waits for it: on the computing stream they would
        hold up work whose answers the awaited requests may depend on.
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
        """Send the answer of a request; returns at once.

        The rows are kept until the next answer to the same lane of the same trunk rank, which cannot ask again before
        it has them.

        Args:
            served_e: tokens of each local expert that were served.
        """
        before = self._sending.pop((key.trunk_rank, key.lane), None)
        if before is not None:
            works, _, sent, sent_step = before
            for work in works:
                self._wait(work, "send an answer to", sent.trunk_rank, sent, sent_step)
        rows_ND = rows_ND.to(self.settings.payload_device).contiguous()
        messages = []
        if self.settings.check:
            header = self._header(key, step, torch.tensor(served_e), rows_ND, key.trunk_rank, "the answer to")
            messages.append((self._host.send, header, self._answer_tag(key)))
        if len(rows_ND):
            messages.append((self._lanes[key.lane].send, rows_ND, _ANSWER_TAG))
        if messages:
            self.bytes_sent += sum(message.nbytes for _, message, _ in messages)
            works = [
                self._post(send, message, tag, "send an answer to", key.trunk_rank, key, step)
                for send, message, tag in messages
            ]
            self._sending[key.trunk_rank, key.lane] = (works, [message for _, message, _ in messages], key, step)

    def _check(self, header: Tensor, key: RequestKey, step: int) -> tuple[list[int], list[int]]:
        """Tokens of each local expert, and the seal, of the header of a request that fits the plan."""
        fields, counts, sealed = self._split(header)
        self._check_fields(fields, "a request", key, step, key.trunk_rank)
        if min(counts, default=0) < 0:
            raise WireError(
                f"{self._me} got negative token counts from {self._name(key.trunk_rank)}: {_describe(key, step)}"
            )
        if sealed and sealed[0] != sum(counts):
            wrong = f"{sealed[0]} rows were sent with token counts of {sum(counts)}"
            self._refuse("the header of", wrong, key.trunk_rank, key, step)
        return counts, sealed


def _describe(key: RequestKey, step: int) -> str:
    return f"{key.kind.name}, lane {key.lane}, layer {key.layer}, micro-batch {key.micro_batch}, step {step}"
