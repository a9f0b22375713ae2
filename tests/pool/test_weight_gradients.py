"""Gradients of a shard's weights, which are computed later than those of its tokens."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pool import grouped_experts, loop_experts
from pool.counts import Counts
from pool.shard import ExpertShard
from tests.pool.shard_work import (
    D,
    F,
    Work,
    assert_gradients,
    assert_near,
    gradients,
    make_shard,
    make_work,
    run_one_by_one,
    several,
    slow,
)


def deferred_bytes_of(works: list[Work]) -> int:
    """x (D), dh (2F), act (F) and dy (D) of every row, in fp32."""
    return sum(len(w.x_ND) for w in works) * (2 * D + 3 * F) * 4


@pytest.mark.parametrize("deferred_bytes", [0, 1, deferred_bytes_of(several()[:2])])
def test_several_drains_equal_one(deferred_bytes: int) -> None:
    works = several()
    split, whole = make_shard(deferred_bytes=deferred_bytes), make_shard()
    for shard in (split, whole):
        run_one_by_one(shard, works)
    assert split.w2_eDF.grad is not None, "the limit was never reached"
    assert whole.w2_eDF.grad is None
    for shard in (split, whole):
        shard.deferred_dw.drain()
        assert_gradients(shard, works)


def test_work_is_computed_once_it_exceeds_the_limit() -> None:
    works = [*several()[:2], make_work([0, 0, 1, 0], seed=9)]
    shard = make_shard(deferred_bytes=deferred_bytes_of(works[:2]))
    run_one_by_one(shard, works[:2])
    assert shard.w2_eDF.grad is None
    run_one_by_one(shard, works[2:])
    assert shard.w2_eDF.grad is not None
    assert_gradients(shard, works)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_gradients_are_summed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """A drain adds to the gradient; beside a large one (1024, whose bf16 neighbour is 8 away) small ones survive."""
    works = several(dtype)
    shard, fresh = make_shard(dtype=dtype), make_shard(dtype=dtype)
    for weight in (shard.w13_e2FD, shard.w2_eDF):
        weight.grad = torch.full_like(weight, 1024.0)
    for work in works:
        for one in (shard, fresh):
            run_one_by_one(one, [work])
            one.deferred_dw.drain()
    for got, want in zip(gradients(shard), gradients(fresh), strict=True):
        assert_near(got - 1024.0, want, tolerance)


def test_a_drain_without_work_leaves_zero_gradients() -> None:
    shard = make_shard()
    shard.deferred_dw.drain()
    for weight, grad in zip((shard.w13_e2FD, shard.w2_eDF), gradients(shard), strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


def test_a_drain_leaves_no_work() -> None:
    """A second drain adds nothing, and does not clear what is there."""
    shard = make_shard()
    run_one_by_one(shard, several())
    shard.deferred_dw.drain()
    once = gradients(shard)
    shard.deferred_dw.drain()
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(shard), strict=True))
    assert any(grad.any() for grad in once)


def test_gradients_that_a_reduction_moves_leave_our_memory() -> None:
    """As DeepSpeed does; the next step's gradients are where the first step's were."""
    shard, reduced = make_shard(), torch.ones(10_000)
    first = [gradient.data_ptr() for gradient in shard.gradients()]
    for weight in shard.parameters():
        assert weight.grad is not None
        weight.grad.data = reduced[: weight.numel()].view_as(weight)
        weight.grad = None
    assert [gradient.data_ptr() for gradient in shard.gradients()] == first
    assert not any(gradient.any() for gradient in shard.gradients())


def test_scale_gradients() -> None:
    shard = make_shard()
    run_one_by_one(shard, several())
    shard.deferred_dw.drain()
    before = gradients(shard)
    shard.scale_gradients(0.25)
    assert all(torch.equal(a * 0.25, b) for a, b in zip(before, gradients(shard), strict=True))


SIX = ([3, 0, 5, 1, 0, 2], [0, 4, 1, 0, 2, 0], [2, 2, 0, 0, 3, 6])


def deferred(kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, some: int) -> ExpertShard:
    """Three backwards of six experts, sealed before the last, with `some` calls of drain_some after every later one."""
    shard = ExpertShard(tuple(range(6)), 16, 8, dtype)
    shard.reset_parameters(0.5, 0.4, 3)
    monkeypatch.setattr(shard, "_kernels", lambda: kernels)
    generator = torch.Generator().manual_seed(1)
    for number, counts in enumerate(SIX):
        if number == 2:
            shard.deferred_dw.seal()
        x_ND, dy_ND = torch.randn(2, sum(counts), 16, generator=generator).to(dtype)
        shard.backward_rows(x_ND, None, dy_ND, [Counts.of(counts)])
        for _ in range(some if number else 0):
            shard.deferred_dw.drain_some()
    shard.deferred_dw.drain()
    assert not shard.deferred_dw.drain_some(), "nothing is left"
    return shard


@pytest.mark.parametrize("kernels", [loop_experts, grouped_experts], ids=lambda m: m.__name__[5:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_when_weight_gradients_are_made_does_not_show(
    kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever part of a batch was computed in idle time; and they are the sums that they should be."""
    at_the_end = gradients(deferred(kernels, dtype, monkeypatch, 0))
    for some in (1, 2, 5):
        assert all(map(torch.equal, gradients(deferred(kernels, dtype, monkeypatch, some)), at_the_end)), some
    whole = gradients(deferred(loop_experts, torch.float32, monkeypatch, 0))
    for got, want in zip(at_the_end, whole, strict=True):
        scale = float(want.abs().max())
        assert float((got - want).abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2) * scale


def test_room_is_made_beyond_the_limit() -> None:
    """Sealed work goes first; the open batch is sealed and computed only if it is too large by itself."""
    one = 8 * (2 * D + 3 * F) * 4  # bytes of a backward with 8 rows, fp32

    def backward(shard: ExpertShard) -> None:
        work = make_work([3, 1, 4, 0], 0)
        shard.backward_rows(work.x_ND, None, work.dy_ND, [Counts.of(work.counts)])
        shard.deferred_dw.drain_if_full()

    shard = make_shard(deferred_bytes=2 * one)
    work = shard.deferred_dw
    backward(shard)
    shard.deferred_dw.seal()
    backward(shard)
    assert len(work._sealed) == 1 and work._sealed_bytes == work._open.bytes == one
    assert work.peak_bytes == 2 * one
    backward(shard)
    assert not work._sealed and work._open.bytes == 2 * one
    backward(shard)
    assert not work._sealed and not work._open.work and work._open.bytes == 0


def test_a_frozen_shard_defers_nothing() -> None:
    shard = make_shard()
    shard.requires_grad_(False)
    works = several()
    _, dxs = run_one_by_one(shard, works)
    for dx_ND, work in zip(dxs, works, strict=True):
        assert_near(dx_ND, slow(shard, work).dx_ND)
    shard.deferred_dw.seal()
    assert not shard.deferred_dw.drain_some() and shard.deferred_dw.peak_bytes == 0
    assert shard.w13_e2FD.grad is None and shard.w2_eDF.grad is None
