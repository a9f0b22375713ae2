"""Gradients of a shard's weights, which are made later than those of its tokens."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pool import grouped_experts, loop_experts
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
)


def stash_bytes_of(works: list[Work]) -> int:
    """x (D), dh (2F), act (F) and dy (D) of every row, in fp32."""
    return sum(len(w.x_ND) for w in works) * (2 * D + 3 * F) * 4


@pytest.mark.parametrize("stash_bytes", [0, 1, stash_bytes_of(several()[:2])])
def test_split_flush_equals_one_flush(stash_bytes: int) -> None:
    works = several()
    split, whole = make_shard(stash_bytes=stash_bytes), make_shard()
    for shard in (split, whole):
        run_one_by_one(shard, works)
    assert split.w2_eDF.grad is not None, "the stash was never full"
    assert whole.w2_eDF.grad is None
    for shard in (split, whole):
        shard.flush()
        assert_gradients(shard, works)


def test_flush_happens_when_the_stash_is_more_than_full() -> None:
    works = [*several()[:2], make_work([0, 0, 1, 0], seed=9)]
    shard = make_shard(stash_bytes=stash_bytes_of(works[:2]))
    run_one_by_one(shard, works[:2])
    assert shard.w2_eDF.grad is None
    run_one_by_one(shard, works[2:])
    assert shard.w2_eDF.grad is not None
    assert_gradients(shard, works)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_gradients_are_summed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    """A flush adds to the gradient; beside a large one (1024, whose bf16 neighbour is 8 away) small ones survive."""
    works = several(dtype)
    shard, fresh = make_shard(dtype=dtype), make_shard(dtype=dtype)
    for weight in (shard.w13_e2FD, shard.w2_eDF):
        weight.grad = torch.full_like(weight, 1024.0)
    for work in works:
        for one in (shard, fresh):
            run_one_by_one(one, [work])
            one.flush()
    for got, want in zip(gradients(shard), gradients(fresh), strict=True):
        assert_near(got - 1024.0, want, tolerance)


def test_flush_of_an_empty_stash_leaves_zero_gradients() -> None:
    shard = make_shard()
    shard.flush()
    for weight, grad in zip((shard.w13_e2FD, shard.w2_eDF), gradients(shard), strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


def test_flush_empties_the_stash() -> None:
    """A second flush adds nothing, and does not clear what is there."""
    shard = make_shard()
    run_one_by_one(shard, several())
    shard.flush()
    once = gradients(shard)
    shard.flush()
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(shard), strict=True))
    assert any(grad.any() for grad in once)


def test_scale_gradients() -> None:
    shard = make_shard()
    run_one_by_one(shard, several())
    shard.flush()
    before = gradients(shard)
    shard.scale_gradients(0.25)
    assert all(torch.equal(a * 0.25, b) for a, b in zip(before, gradients(shard), strict=True))


SIX = ([3, 0, 5, 1, 0, 2], [0, 4, 1, 0, 0, 2], [2, 2, 0, 0, 0, 9])


def stashed(kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, some: int) -> ExpertShard:
    """Three backwards of six experts, a cut before the last, and `some` calls of flush_some at every cut."""
    shard = ExpertShard(tuple(range(6)), 16, 8, dtype)
    shard.reset_parameters(0.5, 0.4, 3)
    monkeypatch.setattr(shard, "_kernels", lambda: kernels)
    generator = torch.Generator().manual_seed(1)
    for number, counts in enumerate(SIX):
        if number == 2:
            shard.cut()
        x_ND, dy_ND = torch.randn(2, sum(counts), 16, generator=generator).to(dtype)
        shard.backward_rows(x_ND, None, dy_ND, [counts])
        for _ in range(some if number else 0):
            shard.flush_some()
    shard.flush()
    assert not shard.flush_some(), "nothing is left"
    return shard


@pytest.mark.parametrize("kernels", [loop_experts, grouped_experts], ids=lambda m: m.__name__[5:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_when_weight_gradients_are_made_does_not_show(
    kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever part of a cut was made in idle time; and they are the sums that they should be."""
    at_the_end = gradients(stashed(kernels, dtype, monkeypatch, 0))
    for some in (1, 2, 5):
        assert all(map(torch.equal, gradients(stashed(kernels, dtype, monkeypatch, some)), at_the_end)), some
    whole = gradients(stashed(loop_experts, torch.float32, monkeypatch, 0))
    for got, want in zip(at_the_end, whole, strict=True):
        scale = float(want.abs().max())
        assert float((got - want).abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2) * scale


def test_room_is_made_when_the_stash_is_full() -> None:
    """What is cut goes first, without another cut; only what is not cut and too much alone is cut and made."""
    one = 8 * (2 * D + 3 * F) * 4  # bytes of a backward with 8 rows, fp32

    def backward(shard: ExpertShard) -> None:
        work = make_work([3, 1, 4, 0], 0)
        shard.backward_rows(work.x_ND, None, work.dy_ND, [work.counts])
        shard.flush_if_full()

    shard = make_shard(stash_bytes=2 * one)
    backward(shard)
    shard.cut()
    backward(shard)
    assert len(shard._ready) == 1 and shard._ready_bytes == shard._uncut_bytes == one
    backward(shard)
    assert not shard._ready and shard._ready_bytes == 0 and shard._uncut_bytes == 2 * one
    backward(shard)
    assert not shard._ready and not shard._stash and shard._uncut_bytes == 0
