"""A shard of experts and its hand-written backward, compared with autograd over single tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pool.shard import ExpertServer, ExpertShard
from tests.pool.shard_work import (
    COUNTS,
    IDS,
    D,
    assert_gradients,
    assert_near,
    gradients,
    make_shard,
    make_work,
    run_merged,
    run_one_by_one,
    several,
    slow,
)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_against_loop_over_tokens(counts: list[int], recompute: bool) -> None:
    """Experts without tokens, all tokens at one expert, no tokens at all."""
    shard = make_shard(recompute=recompute)
    work = make_work(counts, seed=1)
    (y_ND,), (dx_ND,) = run_one_by_one(shard, [work])
    want = slow(shard, work)
    assert_near(y_ND, want.y_ND)
    assert_near(dx_ND, want.dx_ND)
    shard.deferred_dw.drain()
    assert_gradients(shard, [work])
    for place, count in enumerate(counts):
        for grad in gradients(shard):
            assert bool(grad[place].any()) == (count > 0)


@pytest.mark.parametrize("recompute", [False, True])
def test_merged_slot(recompute: bool) -> None:
    """Several requests in one launch, one of them empty: as one by one, and each in its own order."""
    works = several()
    merged, alone = make_shard(recompute=recompute), make_shard(recompute=recompute)
    ys, dxs = run_merged(merged, works)
    want_ys, want_dxs = run_one_by_one(alone, works)
    for got, want in zip(ys + dxs, want_ys + want_dxs, strict=True):
        assert_near(got, want)
    for y_ND, dx_ND, work in zip(ys, dxs, works, strict=True):
        assert_near(y_ND, slow(merged, work).y_ND)
        assert_near(dx_ND, slow(merged, work).dx_ND)
    merged.deferred_dw.drain()
    assert_gradients(merged, works)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_slots_may_differ_from_forward_slots(recompute: bool) -> None:
    works = several()
    shard = make_shard(recompute=recompute)
    server = ExpertServer(shard)
    dxs: dict[int, Tensor] = {}
    for slot in ([0, 1, 2], [3, 4]):
        ys = server.forward(list(slot), [works[n].batch for n in slot], keep_for_backward=True)
        for n, y_ND in zip(slot, ys, strict=True):
            assert_near(y_ND, slow(shard, works[n]).y_ND)
    for slot in ([4, 0], [2], [3, 1]):
        dxs.update(zip(slot, server.backward(list(slot), [works[n].dy_ND for n in slot]), strict=True))
    for n, work in enumerate(works):
        assert_near(dxs[n], slow(shard, work).dx_ND)
    shard.deferred_dw.drain()
    assert_gradients(shard, works)


def test_slots_of_empty_requests() -> None:
    shard = make_shard()
    works = [make_work([0, 0, 0, 0], seed) for seed in range(2)]
    ys, dxs = run_merged(shard, works)
    assert [t.shape for t in ys + dxs] == [(0, D)] * 4
    shard.deferred_dw.drain()
    assert not any(grad.any() for grad in gradients(shard))


@pytest.mark.parametrize("deferred_bytes", [1, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bit_equal(dtype: torch.dtype, deferred_bytes: int) -> None:
    works = several(dtype)
    runs = []
    for _ in range(2):
        shard = make_shard(dtype=dtype, deferred_bytes=deferred_bytes)
        ys, dxs = run_merged(shard, works)
        more_ys, more_dxs = run_one_by_one(shard, works)
        shard.deferred_dw.drain()
        runs.append([*ys, *dxs, *more_ys, *more_dxs, *gradients(shard)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [run_one_by_one, run_merged])
def test_recompute_changes_no_bit(run: Any, dtype: torch.dtype) -> None:
    works = several(dtype)
    outcomes = []
    for recompute in (False, True):
        shard = make_shard(dtype=dtype, recompute=recompute)
        ys, dxs = run(shard, works)
        shard.deferred_dw.drain()
        outcomes.append([*ys, *dxs, *gradients(shard)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_recompute_keeps_tokens_only() -> None:
    """Hidden activations are not held between forward and backward."""
    work = make_work(COUNTS[0], seed=1)
    for recompute in (False, True):
        server = ExpertServer(make_shard(recompute=recompute))
        server.forward(["a"], [work.batch], keep_for_backward=True)
        (saved,) = server._saved.values()
        assert (saved.hidden is None) == recompute


def test_bf16_tracks_fp32() -> None:
    """Tokens in bf16, gradients of the weights in fp32; errors within a few roundings of the largest value."""
    works = several(torch.bfloat16)
    shard = make_shard(dtype=torch.bfloat16)
    ys, dxs = run_merged(shard, works)
    shard.deferred_dw.drain()
    slows = [slow(shard, work) for work in works]
    w13, w2 = gradients(shard)
    assert (w13.dtype, w2.dtype) == (torch.float32, torch.float32)
    assert {t.dtype for t in ys + dxs} == {torch.bfloat16}
    pairs = [
        (torch.cat(ys), torch.cat([s.y_ND for s in slows])),
        (torch.cat(dxs), torch.cat([s.dx_ND for s in slows])),
        (w13, torch.stack([s.w13_grad for s in slows]).sum(0)),
        (w2, torch.stack([s.w2_grad for s in slows]).sum(0)),
    ]
    for got, want in pairs:
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_weights_do_not_depend_on_the_sharding() -> None:
    """Expert 9 starts with the same numbers wherever it lives; other experts and seeds with others."""
    alone, among = make_shard((9,)), make_shard(IDS)
    for name in ("w13_e2FD", "w2_eDF"):
        assert torch.equal(getattr(alone, name)[0], getattr(among, name)[IDS.index(9)])
        experts = [*getattr(among, name), getattr(make_shard((9,), seed=4), name)[0]]
        assert not any(torch.equal(a, b) for n, a in enumerate(experts) for b in experts[:n])


def test_scales_of_initial_weights() -> None:
    shard = ExpertShard(tuple(range(6)), 40, 50, torch.float32)
    shard.reset_parameters(0.5, 0.02, seed=0)
    for weight, std in ((shard.w13_e2FD[:, :50], 0.5), (shard.w13_e2FD[:, 50:], 0.5), (shard.w2_eDF, 0.02)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert weight.mean().item() == pytest.approx(0.0, abs=0.05 * std)


def test_weights_changed() -> None:
    """After a step and weights_changed the experts compute with the new weights, also in backward."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        shard = make_shard(dtype=dtype)
        work = make_work(COUNTS[0], 1, dtype)
        run_one_by_one(shard, [work])
        with torch.no_grad():
            shard.w13_e2FD.neg_()
            shard.w2_eDF.mul_(2.0)
        shard.weights_changed()
        (y_ND,), (dx_ND,) = run_one_by_one(shard, [work])
        assert_near(y_ND, slow(shard, work).y_ND, tolerance)
        assert_near(dx_ND, slow(shard, work).dx_ND, tolerance)


def test_open_forwards() -> None:
    """A forward is open until its backward comes; FORWARD_ONLY leaves nothing."""
    server = ExpertServer(make_shard())
    works = several()
    server.forward(["a", "b"], [works[0].batch, works[2].batch], keep_for_backward=True)
    server.forward(["c"], [works[1].batch], keep_for_backward=False)
    assert server.open_forwards == 2
    counts = [server.counts(key) for key in ("a", "b", "c")]
    assert [c and c.listed for c in counts] == [works[0].counts, works[2].counts, None]
    server.backward(["b"], [works[2].dy_ND])
    assert server.open_forwards == 1
    assert server.counts("b") is None
    for key in ("b", "c"):
        with pytest.raises(KeyError):
            server.backward([key], [works[0].dy_ND])
    with pytest.raises(AssertionError, match="two forwards of a "):
        server.forward(["a"], [works[0].batch], keep_for_backward=True)
    server.backward(["a"], [works[0].dy_ND])
    assert server.open_forwards == 0
    server.forward(["a"], [works[0].batch], keep_for_backward=True)
    assert server.open_forwards == 1


def test_autograd_keeps_out() -> None:
    """Nothing is recorded: outputs need no gradient though the weights do."""
    (y_ND,), (dx_ND,) = run_one_by_one(make_shard(), [make_work(COUNTS[0], 1)])
    assert not y_ND.requires_grad and not dx_ND.requires_grad
