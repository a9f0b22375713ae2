"""Routers: from a layer's hidden states to the experts of each token and their gate values.

Letters: T tokens, D hidden, M experts this layer sees, K top-k. Everything here is computed in fp32, whatever the
dtype of the input and also under autocast: gate values and the order of near-equal experts are sensitive to rounding.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router.norm import broken_rows, norm_route, replace_broken

RouterKind = Literal["norm", "softmax", "sigmoid_bias"]
Scores = Literal["raw", "normalized"]


class Routing(NamedTuple):
    """What a router decides for T tokens. Expert ids are local to the experts that the layer sees, 0..M-1.

    A tuple, because ZeRO-3 finds the tensors of a module's output only in tuples, lists and dicts.

    topk_scores_TK: gate values, fp32, differentiable. NaN for a token whose logits are not all finite.
    topk_expert_ids_TK: int64, K distinct experts a token, whatever the logits are.
    tokens_per_expert_M: int64, how many of the T*K assignments go to each expert; T*K times f_i of METHOD.md.
    mean_scores_M: fp32, differentiable: P_i of METHOD.md, over raw or normalised scores.
    z_loss: fp32 scalar: the mean over tokens of logsumexp(z)^2 (ST-MoE, arXiv:2202.08906, eq. 5), differentiable.
        A router built without it gives a 0 that has no gradient.
    """

    topk_scores_TK: Tensor
    topk_expert_ids_TK: Tensor
    tokens_per_expert_M: Tensor
    mean_scores_M: Tensor
    z_loss: Tensor


def softmax_scores(logits_TM: Tensor, expert_mask_M: Tensor | None = None) -> Tensor:
    """Softmax over all experts that the mask leaves (at least one). Returns: scores_TM, fp32."""
    return _mask(logits_TM.float(), expert_mask_M).softmax(dim=-1)


def sigmoid_scores(logits_TM: Tensor, expert_mask_M: Tensor | None = None) -> Tensor:
    """Each expert's sigmoid, 0 for a masked one. Returns: scores_TM, fp32. Source: arXiv:2408.15664."""
    return _mask(logits_TM.float(), expert_mask_M).sigmoid()


def select_experts(preference_TM: Tensor, top_k: int, expert_mask_M: Tensor | None = None) -> Tensor:
    """The K experts with the largest preference, without gradient.

    Returns: topk_expert_ids_TK, int64, distinct in a row. A masked expert comes only after all unmasked ones. Which of
    equal preferences wins is up to the device.
    """
    return _mask(preference_TM.detach(), expert_mask_M).topk(top_k, dim=-1).indices


def _mask(values_TM: Tensor, expert_mask_M: Tensor | None) -> Tensor:
    return values_TM if expert_mask_M is None else values_TM.masked_fill(~expert_mask_M, float("-inf"))


def _normalize_per_token(scores_TM: Tensor) -> Tensor:
    """Each row divided by its sum; an all-zero row stays zero, in the gradient too."""
    sum_T1 = scores_TM.sum(dim=-1, keepdim=True)
    return scores_TM / torch.where(sum_T1 == 0, 1.0, sum_T1)


def _decide(
    scores_TM: Tensor,
    preference_TM: Tensor,
    broken_T1: Tensor,
    top_k: int,
    normalized: bool,
    expert_mask_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(topk_scores_TK, topk_expert_ids_TK, mean_scores_M) under autograd; the K largest preferences win."""
    ids_TK = replace_broken(select_experts(preference_TM, top_k, expert_mask_M), broken_T1)
    balanced_TM = _normalize_per_token(scores_TM) if normalized else scores_TM
    topk_scores_TK = scores_TM.gather(-1, ids_TK).masked_fill(broken_T1, float("nan"))
    return topk_scores_TK, ids_TK, balanced_TM.mean(dim=0)


def _count_tokens(topk_expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Assignments per expert. Not bincount: that waits for the device to learn the largest id."""
    ids = topk_expert_ids_TK.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


class Router(nn.Module):
    """One layer's router: z = W h, then scores, then top-k. A subclass says what it decides from the logits.

    hidden: D. num_experts: M, the experts that this layer sees. top_k: K. scores: what the mean in P is taken of, the
    scores themselves ("raw", the paper) or each divided by its token's sum ("normalized"). z_loss: compute it.
    The weight is allocated without values: call reset_parameters or load a checkpoint.
    """

    def __init__(self, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalized = scores == "normalized"
        self.has_z_loss = z_loss
        self.weight_MD = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Weight ~ N(0, std^2) from `generator`, which must live on the weight's device."""
        self.weight_MD.normal_(0.0, std, generator=generator)

    def decide(self, logits_TM: Tensor, expert_mask_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(topk_scores_TK, topk_expert_ids_TK, mean_scores_M) of Routing, from fp32 logits."""
        raise NotImplementedError

    def forward(self, h_TD: Tensor, expert_mask_M: Tensor | None = None) -> Routing:
        """Route T >= 1 tokens.

        h_TD: hidden states, any float dtype. expert_mask_M: bool, False takes an expert out (at least one stays).
        Under autocast, leave it before the backward pass: inside it torch computes the weight gradient in bf16.
        """
        with torch.autocast(h_TD.device.type, enabled=False):
            logits_TM = F.linear(h_TD.float(), self.weight_MD.float())
            topk_scores_TK, ids_TK, mean_scores_M = self.decide(logits_TM, expert_mask_M)
            return Routing(
                topk_scores_TK=topk_scores_TK,
                topk_expert_ids_TK=ids_TK,
                tokens_per_expert_M=_count_tokens(ids_TK, len(self.weight_MD)),
                mean_scores_M=mean_scores_M,
                z_loss=self._z_loss(logits_TM, expert_mask_M),
            )

    def _z_loss(self, logits_TM: Tensor, expert_mask_M: Tensor | None) -> Tensor:
        if not self.has_z_loss:
            return logits_TM.new_zeros(())
        return _mask(logits_TM, expert_mask_M).logsumexp(dim=-1).square().mean()


class NormRouter(Router):
    """NormRouter, eq. 7: gate values near 1 from the start, about half of all scores 0.

    With k > 1 a token may select experts of score 0: they add nothing and still count in tokens_per_expert_M.
    sigma starts at 1 and stays positive in any sane run; selection by logits relies on that.
    constant: c, from norm_constant; one for the whole model.
    """

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool, constant: float
    ) -> None:
        super().__init__(hidden, num_experts, top_k, scores, z_loss)
        self.constant = constant
        self.sigma = nn.Parameter(torch.ones(1, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Weight ~ N(0, std^2) from `generator`, sigma 1."""
        super().reset_parameters(std, generator)
        self.sigma.fill_(1.0)

    def decide(self, logits_TM: Tensor, expert_mask_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        sigma = self.sigma.float()
        return norm_route(logits_TM, sigma, self.constant, self.top_k, self.normalized, expert_mask_M)


class SoftmaxRouter(Router):
    """The vanilla baseline: softmax over all experts, then top-k; gate values are not renormalised.

    Its backward is autograd's: the scores' matrix is needed anyway.
    """

    def decide(self, logits_TM: Tensor, expert_mask_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores_TM = softmax_scores(logits_TM, expert_mask_M)
        return _decide(scores_TM, logits_TM, broken_rows(logits_TM), self.top_k, self.normalized, expert_mask_M)


class SigmoidBiasRouter(Router):
    """The aux-free baseline: sigmoid gate values, and an expert bias for the selection only (arXiv:2408.15664).

    Its backward is autograd's: the scores' matrix is needed anyway.
    """

    expert_bias_M: Tensor

    def __init__(self, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool) -> None:
        super().__init__(hidden, num_experts, top_k, scores, z_loss)
        self.register_buffer("expert_bias_M", torch.zeros(num_experts, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Weight ~ N(0, std^2) from `generator`, expert bias 0."""
        super().reset_parameters(std, generator)
        self.expert_bias_M.zero_()

    def decide(self, logits_TM: Tensor, expert_mask_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores_TM = sigmoid_scores(logits_TM, expert_mask_M)
        preference_TM = scores_TM + self.expert_bias_M
        return _decide(scores_TM, preference_TM, broken_rows(logits_TM), self.top_k, self.normalized, expert_mask_M)

    @torch.no_grad()
    def update_bias(self, tokens_per_expert_M: Tensor, rate: float) -> None:
        """Move each bias by rate * sign(mean load - load). Once an optimizer step, with the step's summed counts."""
        load_M = tokens_per_expert_M.float()
        self.expert_bias_M.add_(torch.sign(load_M.mean() - load_M), alpha=rate)


def build_router(
    kind: RouterKind, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool, constant: float
) -> Router:
    """One layer's router of `kind`; the arguments are those of Router, and `constant` serves "norm" only.

    Errors: ValueError for an unknown kind or scores.
    """
    if scores not in ("raw", "normalized"):
        raise ValueError(f"balance.scores is {scores!r}: it must be raw or normalized")
    match kind:
        case "norm":
            return NormRouter(hidden, num_experts, top_k, scores, z_loss, constant)
        case "softmax":
            return SoftmaxRouter(hidden, num_experts, top_k, scores, z_loss)
        case "sigmoid_bias":
            return SigmoidBiasRouter(hidden, num_experts, top_k, scores, z_loss)
    raise ValueError(f"router.kind is {kind!r}: it must be norm, softmax or sigmoid_bias")
