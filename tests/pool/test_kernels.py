"""Both back ends of the experts, compared with one token at a time in float64; the grouped one also runs on the CPU.

Letters: N rows, e experts, D hidden, F expert width.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pool import grouped_experts, loop_experts
from pool.counts import Counts
from pool.permute import merge_order

D, F = 16, 8  # the grouped kernel wants rows of a multiple of 16 bytes
COUNTS = [[3, 0, 5, 1], [0, 0, 7, 0], [4, 2, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 33, 2, 5]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

each_backend = pytest.mark.parametrize("kernels", [loop_experts, grouped_experts], ids=lambda m: m.__name__[5:])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return 0.3 * randn(experts, 2 * F, D, seed=1, dtype=dtype), 0.3 * randn(experts, D, F, seed=2, dtype=dtype)


class Slow:
    """One token after the other by autograd in float64."""

    def __init__(self, x_ND: Tensor, dy_ND: Tensor, w13_e2FD: Tensor, w2_eDF: Tensor, counts: list[int]):
        x_ND, w13, w2 = (t.double().requires_grad_() for t in (x_ND, w13_e2FD, w2_eDF))
        experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
        hidden, acts, outputs = [], [], []
        for n, expert in enumerate(experts):
            h = w13[expert] @ x_ND[n]
            h.retain_grad()
            act = torch.nn.functional.silu(h[:F]) * h[F:]
            hidden.append(h)
            acts.append(act)
            outputs.append(w2[expert] @ act)
        self.y_ND = torch.stack(outputs) if outputs else torch.zeros(0, D, dtype=torch.float64)
        if outputs:
            self.y_ND.backward(dy_ND.double())
        self.dh_N2F = torch.stack([h.grad for h in hidden]) if hidden else torch.zeros(0, 2 * F, dtype=torch.float64)
        self.act_NF = torch.stack(acts).detach() if acts else torch.zeros(0, F, dtype=torch.float64)
        self.dx_ND, self.dw13, self.dw2 = (t.grad if outputs else torch.zeros_like(t) for t in (x_ND, w13, w2))


def assert_near(got: Tensor, want: Tensor | None, dtype: torch.dtype) -> None:
    assert want is not None
    torch.testing.assert_close(got.double(), want.detach(), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def joined(for_weights: Any) -> tuple[Tensor, Tensor]:
    """dh_N2F and act_NF, in whichever form a back end keeps them."""
    dh, act = (torch.cat(kept) if isinstance(kept, list) else kept for kept in for_weights)
    return dh, act


def merged(counts: list[list[int]]) -> Tensor:
    return merge_order(torch.tensor(counts), sum(map(sum, counts)))[0]


@each_backend
@each_dtype
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_forward_and_both_backward_passes(kernels: ModuleType, dtype: torch.dtype, counts: list[int]) -> None:
    n = sum(counts)
    x_ND, dy_ND = randn(n, D, seed=0, dtype=dtype), randn(n, D, seed=3, dtype=dtype)
    w13_e2FD, w2_eDF = weights(len(counts), dtype)
    slow = Slow(x_ND, dy_ND, w13_e2FD, w2_eDF, counts)
    y_ND, hidden = kernels.forward(x_ND, w13_e2FD, w2_eDF, [Counts.of(counts)])
    assert y_ND.dtype == dtype
    assert_near(y_ND, slow.y_ND, dtype)
    for kept in (hidden, None):
        dx_ND, for_weights = kernels.backward(x_ND, kept, dy_ND, w13_e2FD, w2_eDF, [Counts.of(counts)])
        dh_N2F, act_NF = joined(for_weights)
        assert_near(dx_ND, slow.dx_ND, dtype)
        assert_near(dh_N2F, slow.dh_N2F, dtype)
        assert_near(act_NF, slow.act_NF, dtype)
    before13, before2 = (randn(*w.shape, seed=5, dtype=torch.float32) for w in (w13_e2FD, w2_eDF))
    grad13, grad2 = before13.clone(), before2.clone()
    kernels.add_weight_gradients(grad13, grad2, [(x_ND, dy_ND, for_weights, Counts.of(counts))], slice(0, None))
    assert_near(grad13 - before13, slow.dw13, dtype)
    assert_near(grad2 - before2, slow.dw2, dtype)
    for expert, count in enumerate(counts):
        if count == 0:
            assert torch.equal(grad13[expert], before13[expert]), "an expert without rows keeps its gradient"
            assert torch.equal(grad2[expert], before2[expert])


@each_backend
@each_dtype
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0], [0, 1], [1]], ids=str)
def test_backwards_merged_otherwise_than_their_forwards(
    kernels: ModuleType, dtype: torch.dtype, order: list[int]
) -> None:
    """Requests 0 and 1 go forward together and 2 alone; their backwards come in any company and order."""
    counts = [[2, 0, 3, 1], [1, 4, 0, 0], [0, 2, 2, 0]]
    xs, dys = ([randn(sum(c), D, seed=10 * k + i, dtype=dtype) for i, c in enumerate(counts)] for k in (1, 2))
    w13_e2FD, w2_eDF = weights(4, dtype)
    hidden: list[Any] = []
    for together in ([0, 1], [2]):
        x_ND = torch.cat([xs[i] for i in together])[merged([counts[i] for i in together])]
        hidden += kernels.forward(x_ND, w13_e2FD, w2_eDF, [Counts.of(counts[i]) for i in together])[1]
    chosen = [counts[i] for i in order]
    x_ND, dy_ND = (torch.cat([part[i] for i in order])[merged(chosen)] for part in (xs, dys))
    slow = Slow(x_ND, dy_ND, w13_e2FD, w2_eDF, [sum(column) for column in zip(*chosen, strict=True)])
    dx_ND, for_weights = kernels.backward(
        x_ND, [hidden[i] for i in order], dy_ND, w13_e2FD, w2_eDF, [Counts.of(c) for c in chosen]
    )
    assert_near(dx_ND, slow.dx_ND, dtype)
    assert_near(joined(for_weights)[0], slow.dh_N2F, dtype)


@each_backend
@each_dtype
def test_a_stash_of_several_backwards(kernels: ModuleType, dtype: torch.dtype) -> None:
    """The sum over all of it, where some know an expert that others do not."""
    w13_e2FD, w2_eDF = weights(4, dtype)
    stash = []
    want13, want2 = torch.zeros(w13_e2FD.shape, dtype=torch.float64), torch.zeros(w2_eDF.shape, dtype=torch.float64)
    for seed, counts in enumerate([[3, 0, 5, 1], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 2, 2]]):
        x_ND, dy_ND = (randn(sum(counts), D, seed=10 * k + seed, dtype=dtype) for k in (1, 2))
        _, for_weights = kernels.backward(x_ND, None, dy_ND, w13_e2FD, w2_eDF, [Counts.of(counts)])
        stash.append((x_ND, dy_ND, for_weights, Counts.of(counts)))
        slow = Slow(x_ND, dy_ND, w13_e2FD, w2_eDF, counts)
        want13 += slow.dw13
        want2 += slow.dw2
    grad13, grad2 = torch.zeros(w13_e2FD.shape), torch.zeros(w2_eDF.shape)
    kernels.add_weight_gradients(grad13, grad2, stash, slice(0, 2))
    kernels.add_weight_gradients(grad13, grad2, stash, slice(2, 4))
    assert_near(grad13, want13, dtype)
    assert_near(grad2, want2, dtype)


def test_unwritten_parts_of_the_kernel_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves the parts of empty groups unwritten, as pytorch issue 172439 says it may."""
    counts = [3, 0, 2, 0]
    x, dh, act, dy = (randn(5, w, seed=i, dtype=torch.bfloat16) for i, w in enumerate((D, 2 * F, F, D)))
    grouped_mm = torch.nn.functional.grouped_mm

    def unwritten(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = grouped_mm(a, b, offs=offs)
        out[1], out[3] = float("nan"), 1.0
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", unwritten)
    grads = torch.zeros(4, 2 * F, D), torch.zeros(4, D, F)
    grouped_experts.add_weight_gradients(*grads, [(x, dy, (dh, act), Counts.of(counts))], slice(0, 4))
    for grad in grads:
        assert not grad[[1, 3]].any()
        assert grad[[0, 2]].any(dim=(1, 2)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_cuda(counts: list[int]) -> None:
    """The grouped back end on a GPU, its fused kernels with it."""
    n, dtype = sum(counts), torch.bfloat16
    x_ND, dy_ND = randn(n, D, seed=0, dtype=dtype), randn(n, D, seed=3, dtype=dtype)
    w13_e2FD, w2_eDF = weights(len(counts), dtype)
    slow = Slow(x_ND, dy_ND, w13_e2FD, w2_eDF, counts)
    x, dy, w13, w2 = (t.cuda() for t in (x_ND, dy_ND, w13_e2FD, w2_eDF))
    y_ND, hidden = grouped_experts.forward(x, w13, w2, [Counts.of(counts, "cuda")])
    dx_ND, for_weights = grouped_experts.backward(x, hidden, dy, w13, w2, [Counts.of(counts, "cuda")])
    grads = torch.zeros(w13.shape, device="cuda"), torch.zeros(w2.shape, device="cuda")
    grouped_experts.add_weight_gradients(*grads, [(x, dy, for_weights, Counts.of(counts, "cuda"))], slice(0, None))
    for got, want in zip((y_ND, dx_ND, *grads), (slow.y_ND, slow.dx_ND, slow.dw13, slow.dw2), strict=True):
        assert_near(got.cpu(), want, dtype)


@pytest.mark.parametrize(("major", "grouped"), [(8, False), (9, True), (10, True), (12, False)])
def test_the_back_end_of_a_gpu(major: int, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no grouped kernel, its product would loop over the experts and wait for the GPU each time."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    supports = grouped_experts.supports.__wrapped__  # without its cache
    assert supports(torch.device("cuda:0"), torch.bfloat16) is grouped
    assert not supports(torch.device("cuda:0"), torch.float32)
    assert not supports(torch.device("cpu"), torch.bfloat16)


def test_few_numbers_of_rows_reach_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles a kernel for each number and keeps 1,024; the rows that are added belong to nobody's results."""
    sizes: set[int] = set()
    multiply = loop_experts._mm
    monkeypatch.setattr(loop_experts, "_mm", lambda x, *rest, **out: sizes.add(len(x)) or multiply(x, *rest, **out))
    counts = list(range(100, 260))
    x_ND, (w13_e2FD, w2_eDF) = randn(sum(counts), D, seed=0, dtype=torch.float32), weights(len(counts), torch.float32)
    results = []
    for by_onednn, most in ((False, len(counts)), (True, 30)):
        sizes.clear()
        monkeypatch.setattr(loop_experts, "_by_onednn", lambda _, by_onednn=by_onednn: by_onednn)
        y_ND, hidden = loop_experts.forward(x_ND, w13_e2FD, w2_eDF, [Counts.of(counts)])
        kept, recomputed = (
            loop_experts.backward(x_ND, known, x_ND, w13_e2FD, w2_eDF, [Counts.of(counts)])[0]
            for known in (hidden, None)
        )
        results.append((y_ND, kept, recomputed))
        assert len(sizes) <= most
    torch.testing.assert_close(*results)


def test_what_torch_does_without_a_grouped_kernel() -> None:
    """It reads the offsets; if it no longer did, `supports` could say yes to more GPUs."""
    source = Path(torch.__file__).parent / "include" / "ATen" / "native" / "GroupedMMUtils.h"
    fallback = source.read_text().partition("void _grouped_mm_fallback(")[2]
    assert "offs.value().cpu()" in fallback
