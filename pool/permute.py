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
    positions_N = position_M[expert_ids_TK.reshape(-1)]
    order_N = torch.argsort(positions_N, stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return Permutation(order_N, inverse_N, torch.bincount(positions_N, minlength=position_M.numel()))


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


def merge_order(tokens_per_expert: list[list[int]]) -> Tensor:
    """Return the index that merges several expert-major batches, concatenated, into one expert-major batch.

    Args:
        tokens_per_expert: Tokens per expert of every batch, lists of the same length.

    Returns:
        index_N (int64): `torch.cat(batches)[index_N]` is expert-major; within an expert the batches keep their order.
    """
    counts = torch.tensor(tokens_per_expert, dtype=torch.int64)
    experts = torch.arange(counts.shape[1]).repeat(counts.shape[0])
    return torch.argsort(torch.repeat_interleave(experts, counts.reshape(-1)), stable=True)
