"""A shard of experts and its hand-made backward, against autograd over single tokens in float64.

Letters: N rows in expert-major order, D hidden, F expert width, e experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pool import grouped_experts, loop_experts
from pool.shard import ExpertServer, ExpertShard

D, F = 5, 7
IDS = (4, 0, 9, 2)
COUNTS = [[3, 0, 5, 1], [0, 0, 6, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 9, 0, 2]]


def make_shard(ids: tuple[int, ...] = IDS, seed: int = 3, dtype: torch.dtype = torch.float32, **kw: Any) -> ExpertShard:
    shard = ExpertShard(ids, D, F, dtype, **kw)
    shard.reset_parameters(0.5, 0.4, seed)
    return shard


@dataclass(frozen=True)
class Work:
    """One request: tokens, their counts, and the gradient of its answer."""

    x_ND: Tensor
    counts: list[int]
    dy_ND: Tensor

    @property
    def batch(self) -> tuple[Tensor, list[int]]:
        return self.x_ND, self.counts


def make_work(counts: list[int], seed: int, dtype: torch.dtype = torch.float32) -> Work:
    generator = torch.Generator().manual_seed(seed)
    x_ND, dy_ND = torch.randn(2, sum(counts), D, generator=generator).to(dtype)
    return Work(x_ND, counts, dy_ND)


def several(dtype: torch.dtype = torch.float32) -> list[Work]:
    return [make_work(counts, seed, dtype) for seed, counts in enumerate(COUNTS)]


@dataclass(frozen=True)
class Slow:
    """float64 answers of the reference."""

    y_ND: Tensor
    dx_ND: Tensor
    w13_grad: Tensor
    w2_grad: Tensor


def slow(shard: ExpertShard, work: Work) -> Slow:
    """e_i(x) = W2_i( silu(W1_i x) * W3_i x ), one token at a time, and autograd."""
    w13 = shard.w13_e2FD.detach().double().requires_grad_()
    w2 = shard.w2_eDF.detach().double().requires_grad_()
    x_ND = work.x_ND.double().requires_grad_()
    experts = [i for i, count in enumerate(work.counts) for _ in range(count)]
    rows = []
    for n, i in enumerate(experts):
        a, b = w13[i, :F] @ x_ND[n], w13[i, F:] @ x_ND[n]
        rows.append(w2[i] @ (a / (1 + torch.exp(-a)) * b))
    if not rows:
        return Slow(x_ND.detach(), x_ND.detach(), torch.zeros_like(w13), torch.zeros_like(w2))
    y_ND = torch.stack(rows)
    return Slow(y_ND.detach(), *torch.autograd.grad(y_ND, (x_ND, w13, w2), work.dy_ND.double()))


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def gradients(shard: ExpertShard) -> tuple[Tensor, Tensor]:
    assert shard.w13_e2FD.grad is not None and shard.w2_eDF.grad is not None
    return shard.w13_e2FD.grad.clone(), shard.w2_eDF.grad.clone()


def assert_gradients(shard: ExpertShard, works: list[Work], tolerance: float = 1e-5) -> None:
    """The shard's gradients are the reference's, summed over `works`."""
    slows = [slow(shard, work) for work in works]
    w13, w2 = gradients(shard)
    assert_near(w13, torch.stack([s.w13_grad for s in slows]).sum(0), tolerance)
    assert_near(w2, torch.stack([s.w2_grad for s in slows]).sum(0), tolerance)


def run_one_by_one(shard: ExpertShard, works: list[Work]) -> tuple[list[Tensor], list[Tensor]]:
    """(answers, token gradients), every request alone."""
    server = ExpertServer(shard)
    ys = [server.forward([n], [w.batch], keep_for_backward=True)[0] for n, w in enumerate(works)]
    dxs = []
    for n, w in enumerate(works):
        dxs += server.backward([n], [w.dy_ND])
        shard.deferred_dw.drain_if_full()
    return ys, dxs


def run_merged(shard: ExpertShard, works: list[Work]) -> tuple[list[Tensor], list[Tensor]]:
    """(answers, token gradients), all requests in one slot."""
    server = ExpertServer(shard)
    keys: list[object] = list(range(len(works)))
    ys = server.forward(keys, [w.batch for w in works], keep_for_backward=True)
    dxs = server.backward(keys, [w.dy_ND for w in works])
    return ys, dxs


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


def test_scale_gradients() -> None:
    shard = make_shard()
    run_one_by_one(shard, several())
    shard.deferred_dw.drain()
    before = gradients(shard)
    shard.scale_gradients(0.25)
    assert all(torch.equal(a * 0.25, b) for a, b in zip(before, gradients(shard), strict=True))


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
    assert [server.tokens_per_expert(key) for key in ("a", "b", "c")] == [works[0].counts, works[2].counts, None]
    server.backward(["b"], [works[2].dy_ND])
    assert server.open_forwards == 1
    assert server.tokens_per_expert("b") is None
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


SIX = ([3, 0, 5, 1, 0, 2], [0, 4, 1, 0, 0, 2], [2, 2, 0, 0, 0, 9])


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
        shard.backward_rows(x_ND, None, dy_ND, [counts])
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
        shard.backward_rows(work.x_ND, None, work.dy_ND, [work.counts])
        shard.deferred_dw.drain_if_full()

    shard = make_shard(deferred_bytes=2 * one)
    work = shard.deferred_dw
    backward(shard)
    shard.deferred_dw.seal()
    backward(shard)
    assert len(work._sealed) == 1 and work._sealed_bytes == work._open.bytes == one
    backward(shard)
    assert not work._sealed and work._open.bytes == 2 * one
    backward(shard)
    assert not work._sealed and not work._open.work and work._open.bytes == 0
