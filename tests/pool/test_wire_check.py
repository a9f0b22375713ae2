"""The wire's debug check: it names every violation, each caused on purpose, and changes no numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pool.schedule import Kind, RequestKey
from pool.topology import Topology
from pool.wire import WireGroups, WireSettings, pool_wire, trunk_wire
from pool.wire.check import altered, fingerprint, not_finite
from pool.wire.streams import Message
from tests.distributed import run_ranks
from tests.pool.host_streams import HostCommunicator, HostWork
from tests.pool.wire_job import LONG, STEP, D, barrier, connect, error_of, groups, my_rank, settings
from tests.training import assert_same, run_training, tiny

KEY = RequestKey(trunk_rank=0, lane=1, micro_batch=3, layer=1, kind=Kind.BACKWARD)
COUNTS = (2, 0, 3, 0, 0, 0)
NAN = float("nan")


def ones() -> Tensor:
    return torch.ones(5, D)


def poisoned(rows_ND: Tensor) -> Tensor:
    rows_ND = rows_ND.clone()
    rows_ND[1, 2:] = NAN
    return rows_ND


def flipped(rows_ND: Tensor) -> Tensor:
    """The lowest bit of one value."""
    bits = rows_ND.clone().view(torch.int32)
    bits[3, 1] ^= 1
    return bits.view(torch.float32)


class Noisy:
    """A lane that alters what is sent through it."""

    def __init__(self, lane: Any, alter: Callable[[Tensor], Tensor]):
        self._lane, self._alter = lane, alter
        self.recv = lane.recv

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self._altered = [self._alter(t) for t in tensors]
        return self._lane.send(self._altered, peer, tag)


class NoisyCommunicator(HostCommunicator):
    """The same of a device's communicator."""

    def __init__(self, group: Any, alter: Callable[[Tensor], Tensor]):
        super().__init__(group)
        self._alter = alter

    def launch(self, sends: Sequence[Message] = (), receives: Sequence[Message] = ()) -> HostWork:
        self._altered = [(self._alter(tensor), peer) for tensor, peer in sends]
        return super().launch(self._altered, receives)


def with_noise(joined: WireGroups, noise: Callable[[Tensor], Tensor]) -> WireGroups:
    if joined.device is None:
        return replace(joined, lanes=[Noisy(lane, noise) for lane in joined.lanes])
    pair = {name: getattr(joined.device, name) for name in ("requests", "answers")}
    noisy: dict[str, Any] = {name: NoisyCommunicator(own.group, noise) for name, own in pair.items()}
    return replace(joined, device=replace(joined.device, **noisy))


@dataclass(frozen=True)
class Case:
    """A request and its answer with something wrong on the way, and who (rank) finds what."""

    finder: int
    wanted: str
    rows: Callable[[], Tensor] = ones
    counts: tuple[int, ...] = COUNTS
    request_noise: Callable[[Tensor], Tensor] = lambda t: t
    answer_key: RequestKey = KEY
    answered: Callable[[Tensor], Tensor] = lambda t: t
    served: Callable[[list[int]], list[int]] = lambda counts: counts
    answer_noise: Callable[[Tensor], Tensor] = lambda t: t


TRUNK, POOL = "rank 0 (trunk 0)", "rank 1 (pool 0, shard 0)"
CASES = {
    "nothing wrong": Case(0, "no error"),
    "the trunk sends nan": Case(
        0, f"{TRUNK} checked the tokens to {POOL}: 3 of 25 values are not finite", rows=lambda: poisoned(ones())
    ),
    "counts of other rows": Case(
        0, f"{TRUNK} made a request of 5 rows with token counts of 6", counts=(2, 0, 3, 0, 0, 1)
    ),
    "nan on the way to the pool": Case(
        1, f"{POOL} checked the tokens of {TRUNK}: 3 of 25 values are not finite", request_noise=poisoned
    ),
    "a bit on the way to the pool": Case(
        1, f"{POOL} checked the tokens of {TRUNK}: the checksum was ", request_noise=flipped
    ),
    "the pool answers nan": Case(
        1, f"{POOL} checked the answer to {TRUNK}: 3 of 25 values are not finite", answered=poisoned
    ),
    "nan on the way back": Case(
        0, f"{TRUNK} checked the answer of {POOL}: 3 of 25 values are not finite", answer_noise=poisoned
    ),
    "a bit on the way back": Case(0, f"{TRUNK} checked the answer of {POOL}: the checksum was ", answer_noise=flipped),
    "the pool drops a row": Case(
        0, f"{TRUNK} checked the answer of {POOL}: 5 rows were sent, 4 returned", answered=lambda t: t[:-1]
    ),
    "the pool adds a row": Case(
        0,
        f"{TRUNK} checked the answer of {POOL}: 5 rows were sent, 6 returned",
        answered=lambda t: t[[0, 0, 1, 2, 3, 4]],
    ),
    "the pool permutes counts": Case(
        0,
        f"{TRUNK} checked the answer of {POOL}: 2 tokens were sent to expert 0 of the shard, 0 were served",
        served=lambda counts: counts[::-1],
    ),
    "the answer of another layer": Case(
        0,
        f"{TRUNK} got an answer that does not match the schedule from {POOL}: BACKWARD, lane 1, layer 0, "
        "micro-batch 3, step 7; the schedule has BACKWARD",
        answer_key=replace(KEY, layer=0),
    ),
}


def violations(on_device: bool) -> dict[str, str]:
    """What this rank finds in each case. Nobody waits for the end of an exchange that the other breaks off."""
    store, topology = connect(), Topology(1, 1, 1)
    ends = replace(settings(topology, torch.float32, LONG), check=True)
    errors: dict[str, str] = {}
    kept: list[Any] = []
    for name, case in CASES.items():
        joined = groups(store, name, topology, lanes=2, on_device=on_device)
        run = trunk if my_rank() == 0 else pool
        noise = case.request_noise if my_rank() == 0 else case.answer_noise
        kept.append(joined)
        found = error_of(partial(run, case, kept, ends, with_noise(joined, noise)))
        if my_rank() == case.finder:
            errors[name] = found
        else:
            assert found == "no error", (name, found)
        barrier(store, name)
    return errors


def trunk(case: Case, kept: list[Any], ends: WireSettings, joined: WireGroups) -> None:
    answer = trunk_wire(ends, joined).request(KEY, STEP, case.rows(), torch.tensor(case.counts))
    kept.append(answer)
    if case.finder == 0:
        answer.wait()


def pool(case: Case, kept: list[Any], ends: WireSettings, joined: WireGroups) -> None:
    wire = pool_wire(ends, joined)
    kept.append(wire)
    if case.counts != COUNTS or case.rows is not ones:
        return  # the trunk finds it before it sends
    ((rows_ND, counts),) = wire.receive([KEY], STEP).ready()
    wire.answer([case.answer_key], STEP, [case.answered(rows_ND)], [case.served(counts.listed)])
    if case.finder == 1:
        wire.settle()  # the transport of devices checks answers in a thread


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def found(request: pytest.FixtureRequest) -> dict[str, str]:
    first, second = run_ranks(2, violations, request.param)
    return {**first, **second}


@pytest.mark.parametrize("name", CASES)
def test_violations_are_found_and_named(name: str, found: dict[str, str]) -> None:
    assert found[name].startswith(CASES[name].wanted)
    if CASES[name].wanted != "no error":
        assert "BACKWARD, lane 1, layer 1, micro-batch 3, step 7" in found[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints(dtype: torch.dtype) -> None:
    rows_ND = torch.randn(4, 5).to(dtype)
    assert altered(rows_ND, fingerprint(rows_ND)) == ""
    assert "the checksum was" in altered(rows_ND * 2, fingerprint(rows_ND))
    assert not_finite(torch.full((2, 3), torch.inf, dtype=dtype)) == "6 of 6 values are not finite"
    assert altered(rows_ND[:0], fingerprint(rows_ND[:0])) == ""


def test_numbers_stay_as_they_are() -> None:
    """Two lanes, and an evaluation."""
    outcomes = [
        run_training(tiny(parallel={"pool_ranks": 1, "lanes": 2, "check": check}), steps=2) for check in (False, True)
    ]
    assert_same(*outcomes, tolerance=0.0)
