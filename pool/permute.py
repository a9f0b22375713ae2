"""Permuting tokens into expert-major order, and combining the experts' outputs.

Letters: T tokens, K experts per token, D hidden, M experts in the pool, N = T * K assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """The order in which the assignments of one layer travel.

    Attributes:
        order_N: order_N[n] is the flat assignment (token * K + k) at position n.
        inverse_N: The position of each flat assignment.
        tokens_per_expert_M: Assignments of each expert, in shard-major order (int64).
    """

    order_N: Tensor
    inverse_N: Tensor
    tokens_per_expert_M: Tensor


def permutation(expert_ids_TK: Tensor, position_M: Tensor) -> Permutation:
    """Sort the assignments stably by the shard-major position of their expert.

    Args:
        expert_ids_TK: Global expert ids (int64).
        position_M: `Placement.position_M`, on the same device.
    """
    positions_N = position_M.index_select(0, expert_ids_TK.flatten())
    if positions_N.device.type != "cpu" or torch.compiler.is_compiling():
        return _by_distinct_keys(positions_N, position_M.numel())
    sorted_N, order_N = positions_N.sort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel())
    bounds = torch.searchsorted(sorted_N, torch.arange(position_M.numel() + 1))
    return Permutation(order_N, inverse_N, bounds.diff())


def _by_distinct_keys(positions_N: Tensor, experts: int) -> Permutation:
    """Return the same as `permutation`, by sorting keys that are all different and searching in them.

    This is for GPUs. bincount waits for the device there; and to write or to add by an index, deterministically, torch
    sorts once more.
    """
    rows = positions_N.numel()
    # A radix sort takes time in proportion to the bits.
    dtype = torch.int32 if (experts + 1) * rows < 2**31 else torch.int64
    keys_N = (positions_N * rows + torch.arange(rows, device=positions_N.device)).to(dtype)
    sorted_N = keys_N.sort().values
    first_key_M = torch.arange(experts, device=positions_N.device, dtype=dtype) * rows
    # Two searches are one kernel if compiled; the differences of one would be another.
    first_M, end_M = (torch.searchsorted(sorted_N, key_M) for key_M in (first_key_M, first_key_M + rows))
    return Permutation(sorted_N.long() % rows, torch.searchsorted(sorted_N, keys_N), end_M - first_M)


class _Permute(torch.autograd.Function):
    """Gathers rows by a permutation, and their gradients by its inverse, so that no sum depends on atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = order_N.numel() // x_TD.shape[0]
        return x_TD.index_select(0, order_N // ctx.top_k)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return y_ND.index_select(0, inverse_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, order_N), None, None


def permute(x_TD: Tensor, p: Permutation) -> Tensor:
    """Return the dispatched tokens x_ND in expert-major order, in which each token occurs K times."""
    return _Permute.apply(x_TD, p.order_N, p.inverse_N)  # type: ignore[no-any-return]


def combine(y_ND: Tensor, topk_scores_TK: Tensor, p: Permutation) -> Tensor:
    """Sum the expert outputs over K, weighted by their gate values: sum_i g_i(x) e_i(x). Returns y_TD, fp32."""
    y_TKD = _Unpermute.apply(y_ND, p.order_N, p.inverse_N).float().unflatten(0, topk_scores_TK.shape)
    return (y_TKD * topk_scores_TK.unsqueeze(-1)).sum(1)  # type: ignore[no-any-return]


def merge_order(counts_be: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the order that merges several expert-major batches into one, and its inverse.

    Nothing is read from the device, because the shapes say how many rows there are.

    Args:
        counts_be: Rows of each expert in every batch (int64).
        rows: The sum of the counts.

    Returns:
        index_N, inverse_N (int64): `torch.cat(batches)[index_N]` is expert-major, and within an expert the batches keep
        their order; `torch.cat(batches)` is that, indexed by `inverse_N`.
    """
    shift_be = starts(counts_be) - starts(counts_be.t()).t()
    place_N = torch.arange(rows, device=counts_be.device)
    index_N = place_N + _for_each_row(shift_be.t(), counts_be.t(), rows)
    return index_N, place_N - _for_each_row(shift_be, counts_be, rows)


def gather_order(starts_be: Tensor, counts_be: Tensor, rows: int) -> Tensor:
    """Return the index that gathers the rows of all batches as `merge_order` does, wherever they start (int64)."""
    shift_eb = starts_be.t() - starts(counts_be.t())
    return torch.arange(rows, device=counts_be.device) + _for_each_row(shift_eb, counts_be.t(), rows)


def starts(counts: Tensor) -> Tensor:
    """Return where pieces of these lengths start, if they lie one after the other in the order of `flatten`."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def _for_each_row(of_pieces: Tensor, counts: Tensor, rows: int) -> Tensor:
    return of_pieces.flatten().repeat_interleave(counts.flatten(), output_size=rows)
