"""Grouped GEMM: one matrix product an expert over expert-major rows. Dropless, nothing padded.

One back end a device and dtype: CUDA bf16 takes torch's grouped kernel, everything else a loop over the experts'
contiguous segments (on CPU the fastest form that was measured). Letters: N rows, e experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm(x_NI: Tensor, w_eIO: Tensor, tokens_per_expert: list[int]) -> Tensor:
    """Rows of expert i times `w_eIO[i]`. Returns y_NO in the dtype of x."""
    if _has_kernel(x_NI):
        return _kernel(x_NI, w_eIO, _offsets(tokens_per_expert, x_NI.device))
    return _loop(x_NI, w_eIO, tokens_per_expert)


def add_weight_gradient(grad_eOI: Tensor, dy_NO: Tensor, x_NI: Tensor, tokens_per_expert: list[int]) -> None:
    """Add dy^T x of every expert to its part of `grad_eOI` (fp32), in place."""
    if _has_kernel(x_NI):
        grad_eOI += _weight_kernel(dy_NO, x_NI, tokens_per_expert)
    else:
        _weight_loop(grad_eOI, dy_NO, x_NI, tokens_per_expert)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _offsets(tokens_per_expert: list[int], device: torch.device) -> Tensor:
    return torch.tensor(tokens_per_expert).cumsum(0).to(device, torch.int32)


def _kernel(x_NI: Tensor, w_eIO: Tensor, offsets_e: Tensor) -> Tensor:
    if x_NI.shape[0] == 0:
        return x_NI.new_empty(0, w_eIO.shape[2])
    return F.grouped_mm(x_NI, w_eIO, offs=offsets_e)


def _weight_kernel(dy_NO: Tensor, x_NI: Tensor, tokens_per_expert: list[int]) -> Tensor:
    counts_e = torch.tensor(tokens_per_expert, device=x_NI.device)
    grad_eOI = F.grouped_mm(dy_NO.t(), x_NI, offs=_offsets(tokens_per_expert, x_NI.device))
    # An expert without rows: the kernel may leave its part unwritten (pytorch issue 172439).
    return grad_eOI.float().masked_fill_((counts_e == 0)[:, None, None], 0.0)


def _loop(x_NI: Tensor, w_eIO: Tensor, tokens_per_expert: list[int]) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], w_eIO.shape[2])
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        if count:
            torch.mm(x_NI[start : start + count], w_eIO[expert], out=y_NO[start : start + count])
        start += count
    return y_NO


def _weight_loop(grad_eOI: Tensor, dy_NO: Tensor, x_NI: Tensor, tokens_per_expert: list[int]) -> None:
    start = 0
    for expert, count in enumerate(tokens_per_expert):
        if count:
            dy, x = dy_NO[start : start + count], x_NI[start : start + count]
            if dy.dtype == grad_eOI.dtype:
                grad_eOI[expert].addmm_(dy.t(), x)
            else:
                grad_eOI[expert] += dy.t() @ x
        start += count
