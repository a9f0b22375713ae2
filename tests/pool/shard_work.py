"""A small shard, requests for it, and their gradients by autograd over single tokens in float64.

Letters: N rows in expert-major order, D hidden, F expert width, e experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pool.counts import Counts
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
    def batch(self) -> tuple[Tensor, Counts]:
        return self.x_ND, Counts.of(self.counts)


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
