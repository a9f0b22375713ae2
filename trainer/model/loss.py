"""Output projection and cross-entropy in chunks of tokens, so that the logits of all tokens never exist at once.

Letters: B batch, S sequence, T = B * S tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool import compiling


class OutputProjection(nn.Linear):
    """A projection from hidden states to logits, which also computes their loss.

    Both are the forward pass of one module, because ZeRO-3 gathers a weight for the forward pass of its module.

    Args:
        loss_chunk: The maximum number of tokens whose logits exist at once while the loss is computed.
        compute_dtype: The type of matrix products.
        compiled: Whether to compile the logits' product and their loss, in training.
    """

    def __init__(self, hidden: int, vocab: int, loss_chunk: int, compute_dtype: torch.dtype, compiled: bool):
        super().__init__(hidden, vocab, bias=False)
        self._how = (loss_chunk, compute_dtype, compiled)

    def forward(self, x_BSD: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Return the logits (B, S, V); with targets, the mean cross-entropy in nats, fp32."""
        if targets_BS is None:
            return super().forward(x_BSD)
        return mean_cross_entropy(x_BSD, self.weight, targets_BS, *self._how)


def mean_cross_entropy(
    x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, chunk: int, compute_dtype: torch.dtype, compiled: bool = False
) -> Tensor:
    """Return the mean of `F.cross_entropy(F.linear(x_BSD, weight_VD), targets_BS)` in nats, fp32.

    Products are in compute_dtype; the weight's gradient is summed over the chunks in the weight's type.

    Args:
        chunk: The maximum number of tokens whose logits exist at once. If there are no more tokens, autograd
            differentiates the whole; otherwise the forward pass computes the gradients too, chunk by chunk.
        compiled: Whether to do the latter in any case, and to compile a chunk's logits and loss.
    """
    targets_T = targets_BS.flatten()
    if len(targets_T) <= chunk and not compiled:
        logits_BSV = F.linear(x_BSD.to(compute_dtype), weight_VD.to(compute_dtype))
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_T)
    x_TD = x_BSD.flatten(0, 1)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        return _ChunkedCrossEntropy.apply(x_TD, weight_VD, targets_T, chunk, compute_dtype, compiled)  # type: ignore[no-any-return]
    head = partial(F.linear, weight=weight_VD.to(compute_dtype))
    return cross_entropies(head, x_TD.to(compute_dtype), targets_T, chunk).mean()


def cross_entropies(head: Callable[[Tensor], Tensor], x_TD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
    """Return the cross-entropy of each token (T,) in nats, fp32, for use without gradients.

    Args:
        head: Maps hidden states (C, D) to logits (C, V).
        chunk: The maximum number of tokens whose logits exist at once.
    """
    chunks = _chunks(x_TD, targets_T, chunk)
    return torch.cat([F.cross_entropy(head(x_CD).float(), t_C, reduction="none") for x_CD, t_C in chunks])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy, whose gradients are ready after the forward pass except for their factor.

    A backward pass that started from the hidden states would have to compute all logits a second time.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *how: Any) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        losses_T, dx_TD, dw_VD = losses_and_gradients(x_TD, weight_VD, targets_T, wanted, *how)
        ctx.save_for_backward(dx_TD, dw_VD)
        ctx.tokens = len(losses_T)
        return losses_T.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place, which autograd notices if a graph is used twice: it refuses saved tensors that have changed.
        factor = gradient / ctx.tokens
        dx_TD, dw_VD = (None if saved is None else saved.mul_(factor) for saved in ctx.saved_tensors)
        return dx_TD, dw_VD, None, None, None, None


def losses_and_gradients(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    wanted: tuple[bool, bool],
    chunk: int,
    compute_dtype: torch.dtype,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the cross-entropy of each token (T,), and the gradients of their sum by x_TD and weight_VD, if wanted."""
    of_chunk = cross_entropy_with_gradient
    if compiled:
        of_chunk = compiling.compiled(of_chunk, dynamic=False)
    losses: list[Tensor] = []
    dx: list[Tensor] = []
    w_VD = weight_VD.to(compute_dtype)
    dw_VD = torch.zeros_like(weight_VD) if wanted[1] else None
    for x_CD, t_C in _chunks(x_TD.to(compute_dtype), targets_T, chunk):
        loss_C, dlogits_CV = of_chunk(x_CD, w_VD, t_C)
        losses.append(loss_C)
        if wanted[0]:
            dx.append(dlogits_CV @ w_VD)
        if dw_VD is not None and dw_VD.dtype == compute_dtype:
            dw_VD.addmm_(dlogits_CV.t(), x_CD)
        elif dw_VD is not None:
            dw_VD += dlogits_CV.t() @ x_CD
        del dlogits_CV  # before the next chunk's logits exist
    return torch.cat(losses), torch.cat(dx).to(x_TD.dtype) if wanted[0] else None, dw_VD


def cross_entropy_with_gradient(x_CD: Tensor, w_VD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token (C,), fp32, and the gradient softmax - one_hot of x_CD @ w_VD.T.

    No more than two fp32 tensors of the logits' size exist at once. They are made here, because a caller
    would keep those that it passes alive until the call ends.
    """
    log_p_CV = F.linear(x_CD, w_VD).float()
    log_p_CV = torch.log_softmax(log_p_CV, dim=-1)
    loss_C = -log_p_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    dlogits_CV = log_p_CV.exp_().to(x_CD.dtype)
    of_target_C = torch.expm1(-loss_C).to(x_CD.dtype)
    if torch.compiler.is_compiling():  # one kernel writes all
        columns_V = torch.arange(dlogits_CV.shape[1], device=targets_C.device)
        return loss_C, torch.where(columns_V == targets_C.unsqueeze(1), of_target_C.unsqueeze(1), dlogits_CV)
    rows_C = torch.arange(len(targets_C), device=targets_C.device)
    return loss_C, dlogits_CV.index_put_((rows_C, targets_C), of_target_C)


def _chunks(x_TD: Tensor, targets_T: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split tokens into as few chunks of at most `chunk` as are needed, all but the last of one size."""
    count = -(-len(targets_T) // chunk)
    size = -(-len(targets_T) // count)
    return zip(x_TD.split(size), targets_T.split(size), strict=True)
