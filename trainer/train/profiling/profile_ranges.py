"""Names for what a rank does, as ranges in a recording of torch's profiler.

The methods that do the work are replaced by ones that open a range first, and only while a step is recorded. Steps that
are not recorded make no calls for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.profiler import record_function

from pool.schedule import SERVE, Kind, RequestKey
from pool.shard import ExpertServer, ExpertShard
from pool.wire.device import DeviceAnswer, DeviceArrived, DevicePool, DeviceTrunk
from pool.wire.exchange import ExchangePool, ExchangeTrunk
from pool.wire.host import HostAnswer, HostArrived, HostPool, HostTrunk
from router.routers import Router
from trainer.cluster.process_groups import Job
from trainer.engine.role_engine import RoleEngine
from trainer.model.micro_batch import Request
from trainer.model.pool_client import LocalPool, PoolClient, RemotePool

T = TypeVar("T")
Name = Callable[..., str]


@contextmanager
def named_ranges(layers: int, compiled: bool) -> Iterator[None]:
    """Name the work of this process's rank in the `with` block.

    Args:
        layers: L.
        compiled: Whether the trunk's segments are compiled. A router is then part of its segment's graph, and has no
            range of its own.
    """
    wrapped: list[tuple[Any, str, Any]] = [(owner, name, _ranged(owner, name, text)) for owner, name, text in WORK]
    if not compiled:
        wrapped.append((Router, "forward", _ranged(Router, "forward", _always("router"))))
    wrapped += [
        (owner, "run", _with_named_segments(owner.run, layers)) for owner in (PoolClient, RemotePool, LocalPool)
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, replacement in wrapped:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def named_segments(micro_batch: Generator[Request, Tensor, T], layers: int, lane: int) -> Generator[Request, Tensor, T]:
    """Run a micro-batch, each of its segments in a range. The last forward and the first backward are one segment."""
    answer: Any = None
    name = f"forward layer 0 lane {lane}" if layers else f"forward and backward lane {lane}"
    while True:
        with record_function(name):
            try:
                request = micro_batch.send(answer)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
        layer = request.layer
        if request.kind == Kind.BACKWARD:
            name = f"backward layer {layer} lane {lane}"
        else:
            name = f"forward layer {layer + 1} lane {lane}" if layer + 1 < layers else f"head lane {lane}"
        answer = yield request


def lanes_of(lane_order: Sequence[int], segments: int) -> list[int]:
    """Return the lane of each micro-batch, in the order in which they begin.

    Args:
        lane_order: Which lane runs next; see `PoolSchedule.lane_order`.
        segments: Segments of a micro-batch.
    """
    run: Counter[int] = Counter()
    lanes = []
    for lane in lane_order:
        if lane == SERVE:
            continue
        if run[lane] % segments == 0:
            lanes.append(lane)
        run[lane] += 1
    return lanes


def _with_named_segments(run: Callable[..., list[Any]], layers: int) -> Callable[..., list[Any]]:
    @wraps(run)
    def named(
        client: PoolClient, micro_batches: Iterable[Any], lane_order: Sequence[int], *rest: Any, **options: Any
    ) -> list[Any]:
        own_layers = layers if isinstance(client, RemotePool | LocalPool) else 0  # a dense model makes no requests
        lanes = lanes_of(lane_order, 2 * own_layers + 1)
        if isinstance(client, LocalPool):  # its lanes advance together
            lanes = [number % (max(lane_order) + 1) for number in range(len(lanes))]
        segments = (named_segments(m, own_layers, lane) for m, lane in zip(micro_batches, lanes, strict=True))
        return run(client, segments, lane_order, *rest, **options)

    return named


def _ranged(owner: Any, name: str, text: Name) -> Any:
    """Return a method or property of a class, in a range."""
    original = getattr(owner, name)
    function: Callable[..., Any] = getattr(original, "fget", original)  # of a property, or the method itself

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with record_function(text(*args, **options)):
            return function(*args, **options)

    return property(run) if isinstance(original, property) else run


def _always(text: str) -> Name:
    return lambda *args, **options: text


def _serve(kind: str) -> Name:
    """Name a launch of the experts by its requests: layers, and lanes where a schedule has made them."""

    def name(server: ExpertServer, keys: Sequence[Any], *args: Any, **options: Any) -> str:
        known = [key for key in keys if isinstance(key, RequestKey)]
        layers = sorted({key.layer for key in known} or {layer for _, layer in keys})
        return f"serve {kind}{_list('layer', layers)}{_list('lane', sorted({key.lane for key in known}))}"

    return name


def _list(what: str, numbers: Sequence[int]) -> str:
    return f" {what} {','.join(map(str, numbers))}" if numbers else ""


WORK: tuple[tuple[Any, str, Name], ...] = (
    (HostTrunk, "request", _always("send request")),
    (DeviceTrunk, "request", _always("send request")),
    (ExchangeTrunk, "request", _always("send request")),
    (HostAnswer, "wait", _always("wait for pool")),
    (DeviceAnswer, "wait", _always("wait for pool")),
    (HostArrived, "headers_came", _always("wait for requests")),
    (DeviceArrived, "headers_came", _always("wait for requests")),
    (HostArrived, "ready", _always("wait for requests")),
    (DeviceArrived, "ready", _always("wait for requests")),
    (HostPool, "answer", _always("send answers")),
    (DevicePool, "answer", _always("send answers")),
    (ExchangePool, "answer", _always("send answers")),
    (ExpertServer, "forward", _serve("FORWARD")),
    (ExpertServer, "backward", _serve("BACKWARD")),
    (ExpertShard, "add_weight_gradients", _always("weight gradients")),
    (RoleEngine, "grad_norm", _always("gradient norm")),
    (RoleEngine, "step", _always("optimizer")),
    (Job, "sum_over_ranks", _always("sum over all ranks")),
)
"""Methods and properties that do the work, and the name of a call."""
