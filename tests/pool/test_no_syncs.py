"""The grouped back end reads nothing from a GPU: shown on fake CUDA tensors, which know devices, strides and no values.

Operators run with the checks of their CUDA kernels, among them the strides that torch's grouped product allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pool import grouped_experts
from pool.counts import Counts
from pool.permute import combine, permutation, permute
from pool.shard import PIECES_AHEAD, ExpertServer, ExpertShard
from tests.host_reads import host_read, no_host_reads

GPU = torch.device("cuda:0")
SHAPES = {"182m": (768, 3072, 96), "978m": (1536, 6144, 192)}  # D, F, e
ROWS = 16384

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


on_a_fake_gpu = pytest.mark.usefixtures("fake")


def gpu_shard(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> ExpertShard:
    hidden, ffn_hidden, experts = shape
    with GPU:
        shard = ExpertShard(tuple(range(experts)), hidden, ffn_hidden, torch.bfloat16, **keywords)
    monkeypatch.setattr(shard, "_kernels", lambda: grouped_experts)
    monkeypatch.setattr(grouped_experts, "_fused", lambda function, x: function)  # compiling needs a GPU
    return shard


def rows(shard: ExpertShard, number: int = ROWS) -> Tensor:
    return torch.empty(number, shard.w2_eDF.shape[1], dtype=torch.bfloat16, device=GPU)


def counts(shard: ExpertShard, host: list[int] | None = None) -> Counts:
    return Counts(torch.empty(len(shard.expert_ids), dtype=torch.int64, device=GPU), host)


@on_a_fake_gpu
@each_shape
@pytest.mark.parametrize("recompute", [False, True])
def test_launches(shape: tuple[int, int, int], recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request and several, backwards merged otherwise than their forwards, one of them without rows."""
    shard = gpu_shard(shape, monkeypatch, recompute=recompute)
    server = ExpertServer(shard)
    sent = [(rows(shard, number), counts(shard)) for number in (ROWS, ROWS, 0, 77)]
    with no_host_reads() as launches:
        for slot in ([0], [1, 2, 3]):
            for y_ND in server.forward(slot, [sent[i] for i in slot], keep_for_backward=True):
                assert (y_ND.device, y_ND.dtype) == (GPU, torch.bfloat16)
        for slot in ([3, 0], [2], [1]):
            for i, dx_ND in zip(slot, server.backward(slot, [sent[i][0] for i in slot]), strict=True):
                assert dx_ND.shape == sent[i][0].shape
        shard.deferred_dw.drain()
    assert launches["_grouped_mm"] and not server.open_forwards
    assert {grad.device for grad in shard.gradients()} == {GPU}


@on_a_fake_gpu
def test_one_row_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up compiles the graph of all other sizes; see `tests/pool/test_compiling.py`."""
    monkeypatch.setattr(grouped_experts, "compiled", lambda function, dynamic: "compiled")
    launched = [grouped_experts._fused(grouped_experts.swiglu, torch.empty(n, 8, device=GPU)) for n in range(4)]
    assert launched == [grouped_experts.swiglu, grouped_experts.swiglu, "compiled", "compiled"]


class Event:
    """In the place of torch's: a GPU that has done nothing, or everything."""

    done = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.done


@on_a_fake_gpu
@each_shape
def test_pieces_of_deferred_work(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool rank, which knows the counts: a few experts at a time, and not more than a GPU can have ahead."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "done", False)
    shard = gpu_shard((*shape[:2], 12), monkeypatch)
    listed = [ROWS // len(shard.expert_ids)] * len(shard.expert_ids)
    listed[0] += ROWS - sum(listed)
    for _ in range(2):
        shard.backward_rows(rows(shard), None, rows(shard), [counts(shard, listed)])
    work = shard.deferred_dw
    work.seal()
    with no_host_reads():
        launched = [work.drain_some() for _ in range(PIECES_AHEAD + 2)]
        assert launched == [True] * PIECES_AHEAD + [False, False], "the GPU has done nothing yet"
        Event.done = True
        work.drain_until(Future())
    assert not work.drain_some()


@on_a_fake_gpu
def test_a_busy_gpu_does_not_keep_a_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`drain_until` ends when the request has come, however busy the GPU is."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "done", False)
    monkeypatch.setattr("pool.shard.WEIGHTS_AT_A_TIME", 1)
    shard, coming = gpu_shard((64, 64, 64), monkeypatch), Future[int]()
    shard.backward_rows(rows(shard, 64), None, rows(shard, 64), [counts(shard, [1] * 64)])
    shard.deferred_dw.seal()
    looks = iter(range(3))

    def wait(futures: Any, seconds: float) -> None:
        if next(looks) == 2:
            coming.set_result(0)

    monkeypatch.setattr("pool.shard.wait", wait)
    shard.deferred_dw.drain_until(coming)
    assert next(looks, None) is None


@on_a_fake_gpu
@pytest.mark.parametrize("top_k", [1, 2])
def test_permuting_and_combining(top_k: int) -> None:
    x_TD = torch.empty(ROWS, 768, device=GPU, dtype=torch.bfloat16)
    ids_TK = torch.empty(ROWS, top_k, device=GPU, dtype=torch.int64)
    position_M = torch.empty(96, device=GPU, dtype=torch.int64)
    with no_host_reads():
        p = permutation(ids_TK, position_M)
        y_TD = combine(permute(x_TD, p), torch.empty(ROWS, top_k, device=GPU), p)
    assert p.tokens_per_expert_M.shape == (96,) and y_TD.device == GPU


SEEN: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "bincount": (lambda n: torch.bincount(n, minlength=4), "bincount waits"),
    "unique": (lambda n: torch.unique(n), "_unique2 waits"),
    "nonzero": (lambda n: n.nonzero(), "nonzero waits"),
    "mask": (lambda n: n[n > 0], "an index of bools waits"),
    "masked_select": (lambda n: n.masked_select(n > 0), "masked_select waits"),
    "repeat": (lambda n: n.repeat_interleave(n), "repeat_interleave without output_size"),
    "equal": (lambda n: torch.equal(n, n), "equal waits"),
    "item": (lambda n: n[0].item(), "_local_scalar_dense waits"),
    "float": (lambda n: float(n[0]), "_local_scalar_dense waits"),
    "if": (lambda n: 1 if n[0] else 0, "_local_scalar_dense waits"),
    "tolist": (lambda n: n.tolist(), "a copy between cpu and meta"),
    "cpu": (lambda n: n.cpu(), "a copy between cpu and meta"),
    "upload": (lambda n: torch.ones(2).to(n.device), "a copy between cpu and meta"),
    "tensor": (lambda n: torch.tensor([1], device=n.device), "tensor on the device copies"),
    "index": (lambda n: n.index_select(0, torch.zeros(1, dtype=torch.int64)), "tensors of cpu and meta"),
}


@pytest.mark.parametrize(("read", "found"), SEEN.values(), ids=SEEN)
def test_what_a_read_looks_like(read: Callable[[Tensor], object], found: str) -> None:
    """Each is seen, whoever makes it; without these eyes all tests above would pass."""
    assert found in host_read(lambda: read(torch.empty(4, dtype=torch.int64, device="meta")))
