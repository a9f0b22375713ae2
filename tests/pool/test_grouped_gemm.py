"""Grouped products, both back ends, against one product a row in float64.

Letters: N rows, e experts, I inputs, O outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pool.grouped_gemm import _kernel, _loop, _offsets, _weight_kernel, _weight_loop, add_weight_gradient, grouped_gemm

GROUPS = [[3, 0, 5, 1], [0, 0, 7, 0], [4, 2, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 33, 2, 5]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(groups: list[int]) -> list[int]:
    """The expert of each row."""
    return [expert for expert, count in enumerate(groups) for _ in range(count)]


def slow_product(x_NI: Tensor, w_eIO: Tensor, groups: list[int]) -> Tensor:
    y_NO = torch.zeros(len(x_NI), w_eIO.shape[2], dtype=torch.float64)
    for n, expert in enumerate(rows_of(groups)):
        y_NO[n] = x_NI[n].double() @ w_eIO[expert].double()
    return y_NO


def slow_weight_gradient(dy_NO: Tensor, x_NI: Tensor, groups: list[int]) -> Tensor:
    grad_eOI = torch.zeros(len(groups), dy_NO.shape[1], x_NI.shape[1], dtype=torch.float64)
    for n, expert in enumerate(rows_of(groups)):
        grad_eOI[expert] += torch.outer(dy_NO[n].double(), x_NI[n].double())
    return grad_eOI


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_loop(groups: list[int], dtype: torch.dtype) -> None:
    """Odd sizes; weights as they come in use: plain, and a transposed view."""
    n, i, o = sum(groups), 7, 5
    x_NI = randn(n, i, seed=0, dtype=dtype)
    w_eIO = randn(len(groups), i, o, seed=1, dtype=dtype)
    for weight in (w_eIO, w_eIO.transpose(1, 2).contiguous().transpose(1, 2)):
        y_NO = grouped_gemm(x_NI, weight, groups)
        assert y_NO.dtype == dtype
        assert_near(y_NO, slow_product(x_NI, w_eIO, groups), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_weight_gradient_is_added_in_fp32(groups: list[int], dtype: torch.dtype) -> None:
    n, i, o = sum(groups), 7, 5
    x_NI, dy_NO = randn(n, i, seed=0, dtype=dtype), randn(n, o, seed=1, dtype=dtype)
    before_eOI = randn(len(groups), o, i, seed=2, dtype=torch.float32)
    grad_eOI = before_eOI.clone()
    add_weight_gradient(grad_eOI, dy_NO, x_NI, groups)
    assert_near(grad_eOI, before_eOI.double() + slow_weight_gradient(dy_NO, x_NI, groups), dtype)
    for expert, count in enumerate(groups):
        if count == 0:
            assert torch.equal(grad_eOI[expert], before_eOI[expert])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_kernel_equals_loop(groups: list[int], dtype: torch.dtype) -> None:
    """What CUDA takes, run on CPU (rows must be multiples of 16 bytes there)."""
    n, i, o = sum(groups), 16, 8
    x_NI = randn(n, i, seed=0, dtype=dtype)
    w_eOI = randn(len(groups), o, i, seed=1, dtype=dtype)
    w_eIO = randn(len(groups), i, o, seed=2, dtype=dtype)
    for weight in (w_eOI.transpose(1, 2), w_eIO):
        y_NO = _kernel(x_NI, weight, _offsets(groups, x_NI.device))
        assert (y_NO.shape, y_NO.dtype) == ((n, o), dtype)
        assert_near(y_NO, _loop(x_NI, weight, groups).double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_weight_kernel_equals_loop(groups: list[int], dtype: torch.dtype) -> None:
    n, i, o = sum(groups), 16, 8
    x_NI, dy_NO = randn(n, i, seed=0, dtype=dtype), randn(n, o, seed=1, dtype=dtype)
    want_eOI = torch.zeros(len(groups), o, i)
    _weight_loop(want_eOI, dy_NO, x_NI, groups)
    got_eOI = _weight_kernel(dy_NO, x_NI, groups)
    assert got_eOI.dtype == torch.float32
    assert_near(got_eOI, want_eOI.double(), dtype)


def test_weight_kernel_clears_what_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves the parts of empty groups unwritten, as pytorch issue 172439 says it may."""
    groups = [3, 0, 2, 0]
    x_NI, dy_NO = randn(5, 16, seed=0, dtype=torch.bfloat16), randn(5, 8, seed=1, dtype=torch.bfloat16)
    grouped_mm = torch.nn.functional.grouped_mm

    def unwritten(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = grouped_mm(a, b, offs=offs)
        out[1], out[3] = float("nan"), 1.0
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", unwritten)
    grad_eOI = _weight_kernel(dy_NO, x_NI, groups)
    assert not grad_eOI[[1, 3]].any()
    assert_near(grad_eOI, slow_weight_gradient(dy_NO, x_NI, groups), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_cuda(groups: list[int]) -> None:
    n, i, o = sum(groups), 16, 8
    x_NI, dy_NO = randn(n, i, seed=0, dtype=torch.bfloat16), randn(n, o, seed=1, dtype=torch.bfloat16)
    w_eOI = randn(len(groups), o, i, seed=2, dtype=torch.bfloat16)
    y_NO = grouped_gemm(x_NI.cuda(), w_eOI.cuda().transpose(1, 2), groups)
    assert_near(y_NO.cpu(), slow_product(x_NI, w_eOI.transpose(1, 2), groups), torch.bfloat16)
    grad_eOI = torch.zeros(len(groups), o, i, device="cuda")
    add_weight_gradient(grad_eOI, dy_NO.cuda(), x_NI.cuda(), groups)
    assert_near(grad_eOI.cpu(), slow_weight_gradient(dy_NO, x_NI, groups), torch.bfloat16)
    for expert, count in enumerate(groups):
        assert count or not grad_eOI[expert].any()
