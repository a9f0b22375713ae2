"""Experts one after another: the back end for CPUs, for GPUs in fp32, and for those without a grouped product.

The host must know how many rows each expert gets.

An expert's products and the elementwise operations between them run together, while its rows are in the cache; over the
whole batch each elementwise pass would go through memory. Tensors are kept per expert, because the C library reuses the
memory of small tensors, whereas the kernel supplies memory for large ones page by page, every time.

Letters: N rows in expert-major order, n rows of one expert, D hidden, F expert width, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pool.counts import Counts

Hidden = list[Tensor]
"""What is kept of a request: [W1 x, W3 x] of the rows of each expert, (n, 2F)."""
ForWeights = tuple[list[Tensor], list[Tensor]]
"""dh (n, 2F) of each expert, and the input of its W2 (n, F)."""

_silu_backward = torch.ops.aten.silu_backward.grad_input


def forward(
    x_ND: Tensor, w13_e2FD: Iterable[Tensor], w2_eDF: Iterable[Tensor], batches: Sequence[Counts]
) -> tuple[Tensor, list[Hidden]]:
    """Return the outputs y_ND, and the hidden activations of every request.

    Args:
        x_ND: Merged rows of all requests, expert-major.
        w13_e2FD, w2_eDF: The weights; also as `packed` returns them.
        batches: Rows of each expert, of every request; within an expert the requests follow this order.
    """
    counts = _totals(batches)
    y_ND = torch.empty_like(x_ND)
    hidden: list[Hidden] = [[] for _ in batches]
    rows = zip(_by_expert(batches), _rounded(x_ND, counts), y_ND.split(counts), w13_e2FD, w2_eDF, strict=True)
    for parts, x, y, w13, w2 in rows:
        h = _linear(x, w13)
        if len(x):
            a, b = h.chunk(2, dim=1)
            y.copy_(_linear(F.silu(a).mul_(b), w2)[: len(y)])
        h = h[: len(y)]
        for mine, part in zip(hidden, h.split(parts) if len(parts) > 1 else (h,), strict=True):
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
    dx_ND = torch.empty_like(x_ND)
    for_weights: ForWeights = ([], [])
    rows = zip(x_ND.split(counts), _rounded(dy_ND, counts), dx_ND.split(counts), w13_e2FD, w2_eDF, strict=True)
    for expert, (x, dy, dx, w13, w2) in enumerate(rows):
        h = _linear(x, w13) if hidden is None else _joined([parts[expert] for parts in hidden])
        a, b = h.chunk(2, dim=1)
        rounded_dh, silu = h.new_empty(len(dy), h.shape[1]), F.silu(a)
        dh = rounded_dh[: len(x)]
        if len(x):
            da, db = dh.chunk(2, dim=1)
            dact = _linear(dy, w2.t())[: len(x)]
            torch.mul(dact, silu, out=db)
            _silu_backward(dact.mul_(b), a, grad_input=da)
            dx.copy_(_linear(rounded_dh, w13.t())[: len(x)])
        act = silu.mul_(b)
        for kept, tensor in zip(for_weights, (dh, act), strict=True):
            kept.append(tensor)
    return dx_ND, for_weights


def add_weight_gradients(
    grad13_e2FD: Tensor,
    grad2_eDF: Tensor,
    work: Sequence[tuple[Tensor, Tensor, ForWeights, Counts]],
    experts: slice,
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
            dh, x, dy, act = map(_with_zeros, zip(*mine, strict=True))
            grad13 += dh.t() @ x
            grad2 += dy.t() @ act


def packed(weight_eOI: Tensor) -> Sequence[Tensor]:
    """Return the weights of each expert in the layout in which products with them are fastest, as `forward` takes them.

    For bf16 on a CPU, oneDNN would bring weights that are not packed into its own layout for every product.
    """
    if weight_eOI.dtype != torch.bfloat16 or not _by_onednn(weight_eOI):
        return weight_eOI.unbind()
    return [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weight_eOI]


def _rounded(x_ND: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Return the rows of each expert, and rows of later experts behind them so that few different numbers occur.

    oneDNN compiles a kernel for every number of rows and keeps the latest 1,024. The last experts' rows may lack others
    behind them.
    """
    end, round_up = 0, _by_onednn(x_ND)
    for count in counts:
        more = _missing(count) if round_up and end + count + _missing(count) <= len(x_ND) else 0
        yield x_ND[end : end + count + more]
        end += count


def _with_zeros(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate rows, and add rows of zeros so that few different numbers occur; one tensor stays as it is."""
    if len(rows) == 1:
        return rows[0]
    missing = _missing(sum(map(len, rows))) if _by_onednn(rows[0]) else 0
    return torch.cat([*rows, rows[0].new_zeros(missing, rows[0].shape[1])])


def _missing(count: int) -> int:
    """Return how many rows to add so that of the next numbers up to twice the count at most 16 occur."""
    return -count % (1 << max(0, count.bit_length() - 5))


def _linear(x_nI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x W^T. The weight may be packed, or a view of its transpose."""
    if not _by_onednn(x_nI) or not len(x_nI):
        return x_nI.new_empty(0, len(weight_OI)) if not len(x_nI) else torch.mm(x_nI, weight_OI.t())
    # This is what inductor calls for a Linear layer. For few rows it is faster than MKL, which torch.mm calls in fp32,
    # and than oneDNN's general product, which it calls in bf16.
    return torch.ops.mkldnn._linear_pointwise(x_nI, weight_OI, None, "none", [], "")  # type: ignore[no-any-return]


def _by_onednn(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and _ONEDNN[tensor.dtype]


_ONEDNN = {torch.float32: torch.backends.mkldnn.is_available(), torch.float64: False}
_ONEDNN[torch.bfloat16] = _ONEDNN[torch.float32] and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN computes products of this dtype on this CPU."""


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
