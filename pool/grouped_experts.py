"""Experts by torch's grouped matrix multiplication: the back end for GPUs in bf16.

SwiGLU and its backward are one fused kernel each. Letters: N rows in expert-major order, D hidden, F expert width,
e experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pool.counts import Counts
from pool.permute import merge_order


class Hidden(NamedTuple):
    """What is kept of a request: its rows within the tensor [W1 x, W3 x] of all requests merged with it.

    Attributes:
        h_N2F: The tensor of all merged requests.
        starts, counts: By expert, where the request's rows start and how many there are.
    """

    h_N2F: Tensor
    starts: list[int]
    counts: list[int]


ForWeights = tuple[Tensor, Tensor]
"""dh_N2F, and the input of W2, act_NF."""


def forward(x_ND: Tensor, w13_e2FD: Tensor, w2_eDF: Tensor, batches: Sequence[Counts]) -> tuple[Tensor, list[Hidden]]:
    """See `loop_experts.forward`."""
    listed = [counts.listed for counts in batches]
    offsets_e = _offsets(listed, x_ND.device)
    h_N2F = _product(x_ND, w13_e2FD.transpose(1, 2), offsets_e)
    y_ND = _product(_fused(swiglu, x_ND)(h_N2F), w2_eDF.transpose(1, 2), offsets_e)
    starts: list[list[int]] = [[] for _ in batches]
    place = 0
    for parts in zip(*listed, strict=True):
        for mine, count in zip(starts, parts, strict=True):
            mine.append(place)
            place += count
    return y_ND, [Hidden(h_N2F, mine, counts) for mine, counts in zip(starts, listed, strict=True)]


def backward(
    x_ND: Tensor,
    hidden: Sequence[Hidden] | None,
    dy_ND: Tensor,
    w13_e2FD: Tensor,
    w2_eDF: Tensor,
    batches: Sequence[Counts],
) -> tuple[Tensor, ForWeights]:
    """See `loop_experts.backward`."""
    offsets_e = _offsets([counts.listed for counts in batches], x_ND.device)
    h_N2F = _product(x_ND, w13_e2FD.transpose(1, 2), offsets_e) if hidden is None else _joined(hidden)
    dact_NF = _product(dy_ND, w2_eDF, offsets_e)
    dh_N2F, act_NF = _fused(swiglu_backward, x_ND)(h_N2F, dact_NF)
    return _product(dh_N2F, w13_e2FD, offsets_e), (dh_N2F, act_NF)


def add_weight_gradients(
    grad13_e2FD: Tensor,
    grad2_eDF: Tensor,
    work: Sequence[tuple[Tensor, Tensor, ForWeights, Counts]],
    experts: slice,
) -> None:
    """See `loop_experts.add_weight_gradients`."""
    device = grad2_eDF.device
    counts = [c.listed[experts] for *_, c in work]
    if not any(map(sum, counts)):
        return
    # Rows are expert-major, so those of adjacent experts are one piece of every batch.
    starts = [sum(c.listed[: experts.start]) for *_, c in work]
    pieces = [slice(start, start + sum(mine)) for start, mine in zip(starts, counts, strict=True)]
    index_N = merge_order(counts).to(device)
    offsets_e = _offsets(counts, device)
    empty_e11 = (offsets_e.diff(prepend=offsets_e.new_zeros(1)) == 0)[:, None, None]

    def merged(parts: list[Tensor]) -> Tensor:
        rows = [part[piece] for part, piece in zip(parts, pieces, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows).index_select(0, index_N)

    pairs = (
        (grad13_e2FD, [dh for _, _, (dh, _), _ in work], [x for x, *_ in work]),
        (grad2_eDF, [dy for _, dy, *_ in work], [act for _, _, (_, act), _ in work]),
    )
    for grad, dys, xs in pairs:
        product = F.grouped_mm(merged(dys).t(), merged(xs), offs=offsets_e)
        # The kernel may leave the part of an expert without rows unwritten (pytorch issue 172439).
        grad[experts] += product.masked_fill_(empty_e11, 0.0)


def swiglu(h_N2F: Tensor) -> Tensor:
    """Return silu(a) * b of h = [a, b]."""
    a_NF, b_NF = h_N2F.chunk(2, dim=1)
    return F.silu(a_NF) * b_NF


def swiglu_backward(h_N2F: Tensor, dact_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient dh_N2F of h, and swiglu(h) again."""
    a_NF, b_NF = h_N2F.chunk(2, dim=1)
    sigmoid_NF = torch.sigmoid(a_NF)
    silu_NF = a_NF * sigmoid_NF
    da_NF = dact_NF * b_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
    return torch.cat((da_NF, dact_NF * silu_NF), dim=1), silu_NF * b_NF


def _fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return the function compiled into one kernel on a GPU, or as it is on a CPU, where tests use this back end."""
    return _compiled(function) if x.is_cuda and len(x) else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The compiler's cache holds pickles, and its default is a folder in /tmp that anyone may have created before.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "torchinductor"))
    return torch.compile(function, dynamic=True)


def _offsets(batches: Sequence[list[int]], device: torch.device) -> Tensor:
    """Return where the rows of each expert end."""
    return torch.tensor(batches).sum(0).cumsum(0).to(device, torch.int32)


def _product(x_NI: Tensor, w_eIO: Tensor, offsets_e: Tensor) -> Tensor:
    """Multiply the rows of expert i by `w_eIO[i]`. Every row must belong to an expert: others would stay unwritten."""
    if len(x_NI) == 0:
        return x_NI.new_empty(0, w_eIO.shape[2])
    return F.grouped_mm(x_NI, w_eIO, offs=offsets_e)


def _joined(hidden: Sequence[Hidden]) -> Tensor:
    """Concatenate the rows of several requests in the order of `merge_order`."""
    begins: dict[int, int] = {}  # where each tensor starts, once they are concatenated
    tensors: list[Tensor] = []
    length = 0
    for part in hidden:
        if id(part.h_N2F) not in begins:
            begins[id(part.h_N2F)] = length
            tensors.append(part.h_N2F)
            length += len(part.h_N2F)
    index_N = torch.cat(
        [
            torch.arange(part.counts[expert]) + (begins[id(part.h_N2F)] + part.starts[expert])
            for expert in range(len(hidden[0].counts))
            for part in hidden
        ]
    )
    if len(tensors) == 1 and torch.equal(index_N, torch.arange(length)):
        return tensors[0]
    return torch.cat(tensors).index_select(0, index_N.to(tensors[0].device))
