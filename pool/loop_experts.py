"""Experts one after another: the back end for CPUs, for GPUs in fp32, and for those without a grouped product.

The host must know how many rows each expert gets.

An expert's products and the elementwise operations between them run together, while its rows are in the cache; over the
whole batch each elementwise pass would go through memory. Tensors are kept per expert, because the C library reuses the
memory of small tensors, whereas the kernel supplies memory for large ones page by page, every time.

Letters: N rows in expert-major order, n rows of one expert, D hidden, F expert width, e experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pool.counts import Counts

Hidden = list[Tensor]
"""What is kept of a request: [W1 x, W3 x] of the rows of each expert, (n, 2F)."""
ForWeights = tuple[list[Tensor], list[Tensor]]
"""dh (n, 2F) of each expert, and the input of its W2 (n, F)."""

_silu_backward = torch.ops.aten.silu_backward.grad_input


def forward(x_ND: Tensor, w13_e2FD: Tensor, w2_eDF: Tensor, batches: Sequence[Counts]) -> tuple[Tensor, list[Hidden]]:
    """Return the outputs y_ND, and the hidden activations of every request.

    Args:
        x_ND: Merged rows of all requests, expert-major.
        batches: Rows of each expert, of every request; within an expert the requests follow this order.
    """
    counts = _totals(batches)
    y_ND, act_nF = torch.empty_like(x_ND), x_ND.new_empty(max(counts), w2_eDF.shape[2])
    hidden: list[Hidden] = [[] for _ in batches]
    rows = zip(_by_expert(batches), x_ND.split(counts), y_ND.split(counts), w13_e2FD, w2_eDF, strict=True)
    for parts, x, y, w13, w2 in rows:
        h = torch.mm(x, w13.t())
        a, b = h.chunk(2, dim=1)
        act = torch.mul(F.silu(a), b, out=act_nF[: len(x)])
        torch.mm(act, w2.t(), out=y)
        for mine, part in zip(hidden, h.split(parts), strict=True):
            mine.append(part)
    return y_ND, hidden


def backward(
    x_ND: Tensor,
    hidden: Sequence[Hidden] | None,
    dy_ND: Tensor,
    w13_e2FD: Tensor,
    w2_eDF: Tensor,
    batches: Sequence[Counts],
) -> tuple[Tensor, ForWeights]:
    """Return the gradients dx_ND of the tokens, and what the weights' gradients need besides x and dy.

    Args:
        hidden: What the forwards of these requests returned; None computes it again.
        batches: As in `forward`.
    """
    counts = _totals(batches)
    dx_ND, dact_nF = torch.empty_like(x_ND), x_ND.new_empty(max(counts), w2_eDF.shape[2])
    for_weights: ForWeights = ([], [])
    rows = zip(x_ND.split(counts), dy_ND.split(counts), dx_ND.split(counts), w13_e2FD, w2_eDF, strict=True)
    for expert, (x, dy, dx, w13, w2) in enumerate(rows):
        h = torch.mm(x, w13.t()) if hidden is None else _joined([parts[expert] for parts in hidden])
        a, b = h.chunk(2, dim=1)
        dh = torch.empty_like(h)
        da, db = dh.chunk(2, dim=1)
        dact = torch.mm(dy, w2, out=dact_nF[: len(x)])
        silu = F.silu(a)
        torch.mul(dact, silu, out=db)
        act = silu.mul_(b)
        _silu_backward(dact.mul_(b), a, grad_input=da)
        torch.mm(dh, w13, out=dx)
        for kept, tensor in zip(for_weights, (dh, act), strict=True):
            kept.append(tensor)
    return dx_ND, for_weights


def add_weight_gradients(
    grad13_e2FD: Tensor, grad2_eDF: Tensor, work: Sequence[tuple[Tensor, Tensor, ForWeights, Counts]], experts: slice
) -> None:
    """Add weight gradients of some experts in place, expert by expert, so that its gradient stays in the cache.

    In fp32 each backward is a product of its own, which avoids a copy; otherwise all are one product, rounded once.

    Args:
        work: The work of merged backwards: (x_ND, dy_ND, what `backward` returned, rows of each expert).
        experts: The experts whose gradients to add.
    """
    parts = [(dh, x.split(c.listed), dy.split(c.listed), act) for x, dy, (dh, act), c in work]
    for expert in range(len(grad13_e2FD))[experts]:
        grad13, grad2 = grad13_e2FD[expert], grad2_eDF[expert]
        mine = [[rows[expert] for rows in part] for part in parts if len(part[0][expert])]
        if not mine:
            continue
        if mine[0][0].dtype == grad13.dtype:
            for dh, x, dy, act in mine:
                grad13.addmm_(dh.t(), x)
                grad2.addmm_(dy.t(), act)
        else:
            dh, x, dy, act = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*mine, strict=True))
            grad13 += dh.t() @ x
            grad2 += dy.t() @ act


def _totals(batches: Sequence[Counts]) -> list[int]:
    return [sum(parts) for parts in _by_expert(batches)]


def _by_expert(batches: Sequence[Counts]) -> Iterator[tuple[int, ...]]:
    return zip(*(counts.listed for counts in batches), strict=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate an expert's rows of several requests, without a copy if they are adjacent in memory already."""
    first, end = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return torch.cat(parts)
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())
