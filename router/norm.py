"""NormRouter's arithmetic (Eq. M7 of docs/method.md, Eq. 7 of the paper), with a backward pass written by hand.

The scores are s_i = sigma * c * max(0, z_i / (||z||_2 + eps)).

Letters: T tokens, M experts that the layer can choose from, K top-k, E experts that a layer owns, C experts that it
reaches: M, or E when it is locked.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from router.forced import Balanced

EPS = 1e-8  # of Eq. M7


class Faded(NamedTuple):
    """What a layer reaches while the lock is annealed: the whole pool, its foreign experts with smaller scores.

    Attributes:
        factor_M: Factor of each expert's score, fp32 from 0 to 1.
    """

    factor_M: Tensor


class Owned(NamedTuple):
    """What a locked layer reaches: its own experts. All logits stay in the norm.

    Attributes:
        expert_ids_E: The layer's own experts, int64, in ascending order.
        places_M: Place of each of the M experts in `expert_ids_E`, int64; E for foreign experts.
    """

    expert_ids_E: Tensor
    places_M: Tensor


Reach = Faded | Owned | Balanced


def owned(expert_ids_E: Tensor, num_experts: int) -> Owned:
    """Return the reach of a layer that owns `expert_ids_E`, int64, of `num_experts`."""
    places_M = torch.full((num_experts,), len(expert_ids_E), device=expert_ids_E.device)
    places_M[expert_ids_E] = torch.arange(len(expert_ids_E), device=expert_ids_E.device)
    return Owned(expert_ids_E, places_M)


def norm_route(
    logits_TM: Tensor,
    sigma: Tensor,
    constant: float,
    top_k: int,
    normalized: bool,
    reach: Reach | None = None,
    chosen_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gate values, experts and mean scores of Eq. M7 and M14 without the (T, M) matrix of scores.

    The norm and the scale do not change the order of a token's experts. So the top-k reads the logits, only the K
    winners become gate values, and the mean scores are one matrix-vector product.

    With a reach the same is done to its preference q (Eq. M37): min(z, factor * z), or the logits of the own experts.
    Both have the scores of Eq. M36, and the smaller of the two keeps the order of experts without a positive logit.

    Args:
        logits_TM: The logits z, fp32 or float64.
        sigma: The scalar of the layer, (1,), of the same dtype.
        constant: The constant c from `norm_constant`.
        top_k: K.
        normalized: Divide each token's scores by their sum before taking the mean; sigma and the norm then cancel.
        reach: What the layer reaches; None: all M experts alike.
        chosen_TK: The experts, if not those of the K largest logits; distinct within a row. Not with a reach.

    Returns:
        (topk_scores_TK, topk_expert_ids_TK, mean_scores_M). The scores can be differentiated once; a row without a
        positive logit has gradient 0, never NaN. For rows with logits that are not finite see `broken_rows`.
    """
    factor_M = reach.factor_M if isinstance(reach, Faded) else None
    own_E, places_M = reach if isinstance(reach, Owned) else (None, None)
    topk_scores_TK, ids_TK, mean_scores_M = _NormRoute.apply(
        logits_TM, sigma, constant, top_k, normalized, factor_M, own_E, places_M, chosen_TK
    )
    return topk_scores_TK, ids_TK, mean_scores_M


@torch.no_grad()
def biased_choice(logits_TM: Tensor, sigma: Tensor, constant: float, top_k: int, bias_M: Tensor) -> Tensor:
    """Choose the K experts with the largest sum of score and bias among those whose score is positive.

    Where a token has fewer positive scores than K, those of its largest other logits follow, as without a bias: an
    expert that contributes nothing is not chosen for its bias.

    Returns:
        Expert ids (T, K), int64, distinct within a row.
    """
    norm_T1 = torch.linalg.vector_norm(logits_TM, dim=-1, keepdim=True)
    raised_TM = logits_TM * (sigma * constant / (norm_T1 + EPS)) + (bias_M - bias_M.min())
    return torch.where(logits_TM > 0, raised_TM, logits_TM).topk(top_k, dim=-1).indices


def broken_rows(logits_TM: Tensor) -> Tensor:
    """Find the tokens with a logit that is not finite: (T, 1), bool.

    The top-k of NaN may return any ids. Such a token is sent to experts 0 to K - 1 instead, which are distinct and in
    range, and its gate values are NaN, so that the loss and the gradients show the fault.
    """
    return ~logits_TM.detach().sum(dim=-1, keepdim=True).isfinite()


def replace_broken(ids_TK: Tensor, broken_T1: Tensor) -> Tensor:
    """Replace the experts of broken tokens by 0 to K - 1."""
    return torch.where(broken_T1, torch.arange(ids_TK.shape[-1], device=ids_TK.device), ids_TK)


class _NormRoute(torch.autograd.Function):
    """The function behind `norm_route`.

    With r = relu(q), gain = sigma * c / (||z|| + eps) and w the K winners of each token:

        topk_scores_TK = gain * r_w
        mean_scores_C = sum over tokens of weight * r / T, where weight is gain (raw) or 1 / sum of r (normalized)

    Forward and backward allocate one (T, M) buffer each, or two with a factor, and only z is kept between them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TM: Tensor,
        sigma: Tensor,
        constant: float,
        top_k: int,
        normalized: bool,
        factor_M: Tensor | None,
        own_E: Tensor | None,
        places_M: Tensor | None,
        chosen_TK: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        preference_TC = _preference(logits_TM, factor_M, own_E)
        broken_T1 = broken_rows(logits_TM)
        if chosen_TK is None:
            winners_TK, choices_TK = preference_TC.topk(top_k, dim=-1)
            choices_TK = replace_broken(choices_TK, broken_T1)
        else:
            choices_TK = replace_broken(chosen_TK, broken_T1)  # first, because those of a broken token may be any
            winners_TK = preference_TC.gather(-1, choices_TK)
        winners_TK = winners_TK.relu_().masked_fill_(broken_T1, float("nan"))
        norm_T1 = torch.linalg.vector_norm(logits_TM, dim=-1, keepdim=True)
        gain_T1 = sigma * constant / (norm_T1 + EPS)

        active_TC = preference_TC.relu()
        weight_T1 = _reciprocal(active_TC.sum(dim=-1, keepdim=True)) if normalized else gain_T1
        mean_scores_M = _spread(torch.mv(active_TC.T, weight_T1.squeeze(-1)) / len(logits_TM), places_M)

        ctx.constant, ctx.normalized = constant, normalized
        ctx.save_for_backward(logits_TM, winners_TK, choices_TK, norm_T1, gain_T1, weight_T1, factor_M, own_E, places_M)
        ids_TK = choices_TK if own_E is None else own_E[choices_TK]
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return winners_TK * gain_T1, ids_TK, mean_scores_M

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_topk_TK: Tensor | None, _d_ids_TK: None, d_mean_M: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (logits_TM, winners_TK, choices_TK, norm_T1, gain_T1, weight_T1, *reach) = ctx.saved_tensors
        factor_M, own_E, places_M = reach
        preference_TC = _preference(logits_TM, factor_M, own_E)
        d_gain_T1 = torch.zeros_like(gain_T1)
        if d_topk_TK is not None:
            d_gain_T1 += (d_topk_TK * winners_TK).sum(dim=-1, keepdim=True)

        # Through r, where it is positive only. Normalised, the sum of r subtracts the same from each of them.
        if d_mean_M is None:
            d_preference_TC = torch.zeros_like(preference_TC)
        else:
            d_mean_C = (d_mean_M if own_E is None else d_mean_M[own_E]) / len(logits_TM)
            d_preference_TC = preference_TC.relu()
            d_weight_T1 = torch.mv(d_preference_TC, d_mean_C).unsqueeze(-1)
            if ctx.normalized:
                torch.sub(d_mean_C, d_weight_T1 * weight_T1, out=d_preference_TC).mul_(weight_T1)
            else:
                torch.mul(d_mean_C, weight_T1, out=d_preference_TC)
                d_gain_T1 += d_weight_T1
            # relu's own backward, in place; a comparison and masked_fill_ cost ten times as much on a CPU.
            torch.ops.aten.threshold_backward.grad_input(d_preference_TC, preference_TC, 0, grad_input=d_preference_TC)
        if d_topk_TK is not None:
            _add_to_winners(d_preference_TC, choices_TK, d_topk_TK * gain_T1 * winners_TK.sign())
        if factor_M is not None:
            d_preference_TC *= factor_M
        d_logits_TM = _spread(d_preference_TC, places_M)

        # Through the norm, on every logit.
        inverse_T1 = (norm_T1 + EPS).reciprocal()
        along_T1 = torch.where(norm_T1 == 0, 0.0, d_gain_T1 / norm_T1) * inverse_T1 * gain_T1
        d_logits_TM.addcmul_(logits_TM, along_T1, value=-1)
        d_sigma = ctx.constant * (d_gain_T1 * inverse_T1).sum(dim=0)
        return d_logits_TM, d_sigma, None, None, None, None, None, None, None


def _preference(logits_TM: Tensor, factor_M: Tensor | None, own_E: Tensor | None) -> Tensor:
    """Return q of Eq. M37; without a reach, the logits themselves."""
    if factor_M is not None:
        return torch.minimum(logits_TM, logits_TM * factor_M)
    return logits_TM if own_E is None else logits_TM.index_select(-1, own_E)


def _spread(x_C: Tensor, places_M: Tensor | None) -> Tensor:
    """Return values of the experts in reach, (..., C), as those of all M experts: 0 for the others."""
    return x_C if places_M is None else F.pad(x_C, (0, 1)).index_select(-1, places_M)


def _add_to_winners(d_logits_TC: Tensor, ids_TK: Tensor, d_winners_TK: Tensor) -> None:
    """Add the gradients of the K winners in place. A token's winners are distinct, so there are no sums."""
    if torch.compiler.is_compiling():  # comparisons are part of the kernel around them, but a scatter is not
        experts_C = torch.arange(d_logits_TC.shape[-1], device=ids_TK.device)
        for ids_T, d_T in zip(ids_TK.unbind(-1), d_winners_TK.unbind(-1), strict=True):
            d_logits_TC += torch.where(ids_T.unsqueeze(-1) == experts_C, d_T.unsqueeze(-1), 0.0)
    else:
        d_logits_TC.scatter_add_(-1, ids_TK, d_winners_TK)


def _reciprocal(sum_T1: Tensor) -> Tensor:
    """Compute 1 / sum, or 1 where the sum is 0 or too small to have a finite reciprocal."""
    return torch.where(sum_T1 < torch.finfo(sum_T1.dtype).tiny, 1.0, sum_T1).reciprocal()
