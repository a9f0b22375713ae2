"""What both transports of the wire share: settings, errors that name the exchange, headers, and the two ends.

See the package's docstring for how a request travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from pool.counts import Counts
from pool.schedule import Kind, RequestKey
from pool.topology import Topology
from pool.wire.check import FINGERPRINT_FIELDS
from pool.wire.reasons import ran_out
from pool.wire.streams import Communicator, Streams

_KEY_FIELDS = 5


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
        payload_device: Where payloads are sent from and received into: "cpu" for gloo, otherwise `device`.
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
class DeviceGroups:
    """What carries payloads between GPUs.

    Attributes:
        requests: A communicator over all ranks on which trunk ranks send and pool ranks receive.
        answers: The same for the other direction.
        streams: The device's streams.
        lost: Says which peers are known to be gone; "" if none.
    """

    requests: Communicator
    answers: Communicator
    streams: Streams
    lost: Callable[[], str]


@dataclass(frozen=True)
class WireGroups:
    """The process groups of the wire, each over all ranks.

    Attributes:
        host: A gloo group for headers.
        lanes: For payloads in host memory, a gloo group per lane.
        device: For payloads on GPUs, their communicators.
    """

    host: Any
    lanes: Sequence[Any] = ()
    device: DeviceGroups | None = None


@dataclass(frozen=True)
class Exchange:
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


class Answer(Protocol):
    """An answer in progress."""

    @property
    def future(self) -> Future[Any]:
        """What is done when `wait` returns without waiting on the host."""

    def wait(self) -> Tensor:
        """Return the answer's rows (N, D), in the order of the request's, ready for use on the current stream."""


class Arrived(Protocol):
    """The requests of a slot, which are on their way."""

    @property
    def future(self) -> Future[Any]:
        """What is done when `ready` returns without waiting on the host."""

    @property
    def headers_came(self) -> float:
        """When the last header had arrived, by `time.perf_counter`. Waits for it."""

    def ready(self) -> list[tuple[Tensor, Counts]]:
        """Return each request's rows (n, D) and rows of each local expert, ready for use on the current stream.

        The counts are known on the host too.

        Raises:
            WireError: A message did not arrive in time, its sender is gone, or it is not the one in the schedule.
        """


class TrunkWire(Protocol):
    """A trunk rank's end of the wire.

    Attributes:
        limit: Longest wait for one message: `WireSettings.timeout`, unless a caller allows more.
        bytes_sent, bytes_received: Headers and payloads since the start.
    """

    settings: WireSettings
    limit: timedelta
    bytes_sent: int
    bytes_received: int

    def request(self, key: RequestKey, step: int, rows_ND: Tensor, tokens_per_expert_M: Tensor) -> Answer:
        """Send a request to every shard, and start receiving its answer.

        Args:
            rows_ND: Tokens (forward) or output gradients (backward), expert-major over the whole pool.
            tokens_per_expert_M: Rows of each expert (int64), in shard-major order, on the device that computes.
        """

    def settle(self) -> None:
        """Wait until all messages that were started have come and gone. Call it at the end of a step.

        Raises:
            WireError: One of them did not.
        """


class PoolWire(Protocol):
    """A pool rank's end of the wire. Its attributes are those of `TrunkWire`."""

    settings: WireSettings
    limit: timedelta
    bytes_sent: int
    bytes_received: int

    def receive(self, keys: Sequence[RequestKey], step: int) -> Arrived:
        """Receive the requests of one slot in a thread beside the computing one, after those of earlier calls."""

    def stop(self) -> None:
        """Receive no more, because of an error."""

    def answer(
        self, keys: Sequence[RequestKey], step: int, rows: Sequence[Tensor], served: Sequence[Sequence[int]]
    ) -> None:
        """Send the answers of requests that were computed together, and return at once.

        Args:
            rows: For each request its answer (n, D), which the current stream computes.
            served: For each request the tokens of each local expert that were served.
        """

    def settle(self) -> None:
        """See `TrunkWire.settle`."""


class End:
    """What the ends of both transports share: named errors and headers.

    Attributes:
        settings: See `WireSettings`.
        limit, bytes_sent, bytes_received: See `TrunkWire`.
    """

    def __init__(self, settings: WireSettings):
        self.settings, self.limit = settings, settings.timeout
        self.bytes_sent = self.bytes_received = 0

    @contextmanager
    def naming(self, doing: str, exchange: Exchange) -> Iterator[None]:
        """Turn an error of a process group into a WireError that names the exchange."""
        try:
            yield
        except RuntimeError as error:
            raise self.failed(doing, exchange, error) from error

    def failed(self, doing: str, exchange: Exchange, error: BaseException, peers: str = "") -> WireError:
        """Return the error that says what this rank could not do with a peer, or with one of several, and why."""
        if isinstance(error, WireError):
            return error
        reason = " ".join(str(error).split())
        limit = self.limit.total_seconds()
        how = f"within {limit:g} s" if ran_out(reason) else "because the connection broke"
        return WireError(
            f"{self.me} could not {doing} {peers or self.name(exchange.peer)} {how}: {exchange} ({reason})"
        )

    def split(self, header: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Split a header into (fields, tokens of each expert, fingerprint)."""
        counts_end = _KEY_FIELDS + self.settings.num_local_experts
        values = header.tolist()
        return values[:_KEY_FIELDS], values[_KEY_FIELDS:counts_end], values[counts_end:]

    def header_buffer(self) -> Tensor:
        """Return room for a header."""
        extra = FINGERPRINT_FIELDS if self.settings.check else 0
        return torch.empty(_KEY_FIELDS + self.settings.num_local_experts + extra, dtype=torch.int64)

    def check_fields(self, got: list[int], message: str, exchange: Exchange) -> None:
        """Check that a header's fields are those of the schedule."""
        if got == exchange.fields:
            return
        kind, step, lane, micro_batch, layer = got
        name = Kind(kind).name if kind in list(Kind) else f"kind {kind}"
        raise WireError(
            f"{self.me} got {message} that does not match the schedule from {self.name(exchange.peer)}: "
            f"{name}, lane {lane}, layer {layer}, micro-batch {micro_batch}, step {step}; the schedule has {exchange}"
        )

    def check_request(self, header: Tensor, exchange: Exchange) -> tuple[list[int], list[int]]:
        """Check the header of a request; return the tokens of each local expert, and the fingerprint of its payload."""
        fields, counts, sent = self.split(header)
        self.check_fields(fields, "a request", exchange)
        if min(counts, default=0) < 0:
            raise WireError(f"{self.me} got negative token counts from {self.name(exchange.peer)}: {exchange}")
        if sent and sent[0] != sum(counts):
            wrong = f"{sent[0]} rows were sent with token counts of {sum(counts)}"
            self.refuse("the header of", wrong, exchange)
        return counts, sent

    def check_rows(self, rows: int, counted: int, key: RequestKey, step: int) -> None:
        """Check that a request has as many rows as its counts say."""
        if rows != counted:
            raise WireError(
                f"{self.me} made a request of {rows} rows with token counts of {counted}: "
                f"{Exchange(self.settings.rank, key, step)}"
            )

    def refuse(self, payload: str, wrong: str, exchange: Exchange) -> NoReturn:
        """Raise the error that a check has found `wrong` with a payload."""
        raise WireError(f"{self.me} checked {payload} {self.name(exchange.peer)}: {wrong}: {exchange}")

    def name(self, rank: int) -> str:
        """Return how errors name a rank."""
        return self.settings.topology.describe(rank)

    @property
    def me(self) -> str:
        """How errors name this rank."""
        return self.name(self.settings.rank)
