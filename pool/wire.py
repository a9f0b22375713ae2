"""The wire: how tokens of one layer travel between a trunk rank and the shards of the pool.

A request is a header (kind, step, lane, micro-batch, layer, tokens of each expert of the shard) and a payload to each
shard; the answer is one payload back, of the same number of rows. Headers go over a host group (gloo), so that receive
buffers are sized without touching the device; payloads go over the lane's own group in the compute dtype. A shard
without tokens gets the header only. Only this file talks to process groups about tokens.

Every wait has a time limit, and every error names the ranks, the lane, the layer and the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pool.plan import Kind, RequestKey
from pool.topology import Topology

_HEADER_FIELDS = 5
_REQUEST_TAG, _ANSWER_TAG = 1, 2  # of payloads, in a lane's own group; a header's tag is its lane


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
    """

    topology: Topology
    rank: int
    num_local_experts: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    payload_device: torch.device
    timeout: timedelta


class _Wire:
    """What both ends share: the groups, named waits, buffers.

    Args:
        settings: see `WireSettings`.
        host_group: gloo process group over all ranks, for headers.
        lane_groups: one process group over all ranks a lane, for payloads.
    """

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        self.settings = settings
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

    def _payload_buffer(self, rows: int) -> Tensor:
        s = self.settings
        return torch.empty(rows, s.hidden, dtype=s.dtype, device=s.payload_device)

    def _name(self, rank: int) -> str:
        return self.settings.topology.describe(rank)

    @property
    def _me(self) -> str:
        return self._name(self.settings.rank)


class Answer:
    """An answer under way: holds the buffers until `wait`."""

    def __init__(self, rows_ND: Tensor, waits: list[tuple[Any, str, int]], wire: TrunkWire, key: RequestKey, step: int):
        self._rows_ND = rows_ND
        self._waits = waits
        self._wire = wire
        self._key = key
        self._step = step
        self.sent: list[Tensor] = []

    def wait(self) -> Tensor:
        """The answer's rows (N, D), in the order of the request's, on the compute device."""
        for work, doing, peer in self._waits:
            self._wire._wait(work, doing, peer, self._key, self._step)
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
        answer_ND = self._payload_buffer(sent_ND.shape[0])
        lane = self._lanes[key.lane]
        answer = Answer(answer_ND, [], self, key, step)
        start = 0
        for shard, (size, counts_e) in enumerate(zip(sizes, counts_se, strict=True)):
            peer = s.topology.pool_rank(shard, key.trunk_rank)
            header = torch.cat((torch.tensor([key.kind, step, key.lane, key.micro_batch, key.layer]), counts_e))
            answer.sent.append(header)
            messages = [(self._host.send, header, key.lane, "send a header to")]
            if size:
                rows = sent_ND[start : start + size]
                answer.sent.append(rows)
                messages.append((lane.send, rows, _REQUEST_TAG, "send tokens to"))
                messages.append((lane.recv, answer_ND[start : start + size], _ANSWER_TAG, "get the answer of"))
            for operation, message, tag, doing in messages:
                answer._waits.append((self._post(operation, message, tag, doing, peer, key, step), doing, peer))
            start += size
        return answer


class PoolWire(_Wire):
    """A pool rank's end of the wire."""

    def __init__(self, settings: WireSettings, host_group: Any, lane_groups: Sequence[Any]):
        super().__init__(settings, host_group, lane_groups)
        self._sending: dict[tuple[int, int], tuple[Any, Tensor, RequestKey, int]] = {}
        if settings.payload_device.type == "cuda":
            self._receive_stream = torch.cuda.Stream(settings.device)

    def receive(self, keys: Sequence[RequestKey], step: int) -> list[tuple[Tensor, list[int]]]:
        """Receive the requests of one slot: for each key its rows (n, D) and the tokens of each local expert.

        Raises:
            WireError: a message did not come in time, its sender is gone, or it is not what the plan says.
        """
        e = self.settings.num_local_experts
        headers = [torch.empty(_HEADER_FIELDS + e, dtype=torch.int64) for _ in keys]
        posted = [
            self._post(self._host.recv, h, k.lane, "get a header from", k.trunk_rank, k, step)
            for h, k in zip(headers, keys, strict=True)
        ]
        received: list[tuple[Tensor, list[int]]] = []
        works: list[tuple[RequestKey, Any]] = []
        for key, header, work in zip(keys, headers, posted, strict=True):
            self._wait(work, "get a header from", key.trunk_rank, key, step)
            counts = self._check(header.tolist(), key, step)
            rows_ND = self._payload_buffer(sum(counts))
            received.append((rows_ND, counts))
            if len(rows_ND):
                receive = self._lanes[key.lane].recv
                work = self._post(receive, rows_ND, _REQUEST_TAG, "get tokens from", key.trunk_rank, key, step)
                works.append((key, work))
        for key, work in works:
            self._wait(work, "get tokens from", key.trunk_rank, key, step)
        return [(rows_ND.to(self.settings.device), counts) for rows_ND, counts in received]

    def receive_in_thread(self, keys: Sequence[RequestKey], step: int) -> list[tuple[Tensor, list[int]]]:
        """`receive` in a thread beside the computing one.

        On a GPU the waits go to a stream of their own, and the host waits for it: on the computing stream they would
        hold up work whose answers the awaited requests may depend on.
        """
        if self.settings.payload_device.type != "cuda":
            return self.receive(keys, step)
        with torch.cuda.device(self.settings.device), torch.cuda.stream(self._receive_stream):
            requests = self.receive(keys, step)
            self._receive_stream.synchronize()
        for rows_ND, _ in requests:
            rows_ND.record_stream(torch.cuda.default_stream(self.settings.device))
        return requests

    def answer(self, key: RequestKey, step: int, rows_ND: Tensor) -> None:
        """Send the answer of a request; returns at once.

        The rows are kept until the next answer to the same lane of the same trunk rank, which cannot ask again before
        it has them.
        """
        before = self._sending.pop((key.trunk_rank, key.lane), None)
        if before is not None:
            work, _, sent, sent_step = before
            self._wait(work, "send an answer to", sent.trunk_rank, sent, sent_step)
        if len(rows_ND) == 0:
            return
        rows_ND = rows_ND.to(self.settings.payload_device).contiguous()
        send = self._lanes[key.lane].send
        work = self._post(send, rows_ND, _ANSWER_TAG, "send an answer to", key.trunk_rank, key, step)
        self._sending[key.trunk_rank, key.lane] = (work, rows_ND, key, step)

    def _check(self, header: list[int], key: RequestKey, step: int) -> list[int]:
        expected = [key.kind, step, key.lane, key.micro_batch, key.layer]
        got, counts = header[:_HEADER_FIELDS], header[_HEADER_FIELDS:]
        if got != expected:
            kind, got_step, lane, micro_batch, layer = got
            name = Kind(kind).name if kind in list(Kind) else f"kind {kind}"
            raise WireError(
                f"{self._me} got a request that does not fit the plan from {self._name(key.trunk_rank)}: "
                f"{name}, lane {lane}, layer {layer}, micro-batch {micro_batch}, step {got_step}; "
                f"the plan has {_describe(key, step)}"
            )
        if min(counts, default=0) < 0:
            raise WireError(
                f"{self._me} got negative token counts from {self._name(key.trunk_rank)}: {_describe(key, step)}"
            )
        return counts


def _describe(key: RequestKey, step: int) -> str:
    return f"{key.kind.name}, lane {key.lane}, layer {key.layer}, micro-batch {key.micro_batch}, step {step}"
