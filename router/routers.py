"""Routers: from a layer's hidden states to the experts of each token and their gate values.

Everything here is computed in fp32, whatever the dtype of the input and also under autocast, because gate values and
the order of nearly equal experts are sensitive to rounding. "Eq. M5" and the like are equations of docs/method.md.

Letters: T tokens, D hidden, M experts that the layer can choose from, K top-k.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router.forced import Balanced, experts_in_turn
from router.norm import Reach, biased_choice, broken_rows, norm_route, replace_broken

RouterKind = Literal["norm", "norm_bias", "softmax", "sigmoid_bias"]
Scores = Literal["raw", "normalized"]

SIGMOID_EPS = 1e-20  # of Eq. M10, for gate values that are all nearly 0


class Routing(NamedTuple):
    """What a router decides for T tokens. Expert ids count from 0 to M - 1 within the experts of the layer.

    It is a tuple because ZeRO-3 finds the tensors of a module's output only in tuples, lists and dicts.

    Attributes:
        topk_scores_TK: Gate values, fp32, differentiable; NaN for a token with a logit that is not finite.
        topk_expert_ids_TK: K distinct experts per token, int64, whatever the logits are.
        tokens_per_expert_M: How many of the T * K assignments go to each expert, int64: T * K times f of Eq. M13.
        mean_scores_M: P of Eq. M14, fp32, differentiable.
        z_loss: Eq. M12, an fp32 scalar, differentiable. A router built without it returns a 0 that has no gradient.
    """

    topk_scores_TK: Tensor
    topk_expert_ids_TK: Tensor
    tokens_per_expert_M: Tensor
    mean_scores_M: Tensor
    z_loss: Tensor


def select_experts(preference_TM: Tensor, top_k: int) -> Tensor:
    """Select the K experts with the largest preference, without gradient (Eq. M6).

    Returns:
        Expert ids (T, K), int64, distinct within a row. Which of equal preferences wins depends on the device.
    """
    return preference_TM.detach().topk(top_k, dim=-1).indices


def _normalize_per_token(scores_TM: Tensor) -> Tensor:
    """Divide each row by its sum; a row of zeros stays zero, in the gradient too."""
    sum_T1 = scores_TM.sum(dim=-1, keepdim=True)
    return scores_TM / torch.where(sum_T1 == 0, 1.0, sum_T1)


def _decide(
    scores_TM: Tensor,
    preference_TM: Tensor,
    broken_T1: Tensor,
    top_k: int,
    normalized: bool,
    forced_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (topk_scores_TK, topk_expert_ids_TK, mean_scores_M) under autograd; the K largest preferences win."""
    chosen_TK = select_experts(preference_TM, top_k) if forced_TK is None else forced_TK
    ids_TK = replace_broken(chosen_TK, broken_T1)
    balanced_TM = _normalize_per_token(scores_TM) if normalized else scores_TM
    topk_scores_TK = scores_TM.gather(-1, ids_TK).masked_fill(broken_T1, float("nan"))
    return topk_scores_TK, ids_TK, balanced_TM.mean(dim=0)


def _count_tokens(topk_expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Count assignments per expert. `bincount` would wait for the device to find the largest id."""
    ids = topk_expert_ids_TK.flatten()
    if torch.compiler.is_compiling():  # one kernel; adding ones by an index is many, if it is to be deterministic
        return (ids == torch.arange(num_experts, device=ids.device).unsqueeze(-1)).sum(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


class Router(nn.Module):
    """One layer's router: logits (Eq. M5), then scores, then top-k. A subclass defines `decide`.

    The weight is allocated without values; call `reset_parameters` or load a checkpoint.

    Args:
        hidden: D.
        num_experts: M, the experts that the layer can choose from.
        top_k: K.
        scores: Which scores make P of Eq. M14: "raw" as in the paper, or "normalized" by each token's sum.
        z_loss: Whether to compute the z-loss.

    Attributes:
        bias_M: A learned term of the logits, which only some softmax routers have.
    """

    bias_M: nn.Parameter | None

    def __init__(self, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalized = scores == "normalized"
        self.has_z_loss = z_loss
        self.weight_MD = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32))
        self.register_parameter("bias_M", None)

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, std^2) with `generator`, which must be on the weight's device."""
        self.weight_MD.normal_(0.0, std, generator=generator)

    def decide(self, logits_TM: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (topk_scores_TK, topk_expert_ids_TK, mean_scores_M) of `Routing`, from fp32 logits.

        Args:
            forced_TK: The experts, if they are not to be chosen by the scores.
        """
        raise NotImplementedError

    def decide_within(self, logits_TM: Tensor, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `decide` does, for a layer that reaches only a part of its experts, or some of them less."""
        raise NotImplementedError(f"{type(self).__name__} has no locked form")

    def forward(self, h_TD: Tensor, reach: Reach | None = None) -> Routing:
        """Route T >= 1 tokens.

        Leave autocast before the backward pass; within it, torch would compute the weight's gradient in bf16.

        Args:
            h_TD: Hidden states, any float dtype.
            reach: What the layer reaches, in a run with a lock or with forced routing.
        """
        with torch.autocast(h_TD.device.type, enabled=False):
            logits_TM = F.linear(h_TD.float(), self.weight_MD.float(), self.bias_M)
            if isinstance(reach, Balanced):
                forced_TK = experts_in_turn(reach, len(logits_TM), self.top_k, len(self.weight_MD))
                decided = self.decide(logits_TM, forced_TK)
            else:
                decided = self.decide(logits_TM) if reach is None else self.decide_within(logits_TM, reach)
            topk_scores_TK, ids_TK, mean_scores_M = decided
            return Routing(
                topk_scores_TK=topk_scores_TK,
                topk_expert_ids_TK=ids_TK,
                tokens_per_expert_M=_count_tokens(ids_TK, len(self.weight_MD)),
                mean_scores_M=mean_scores_M,
                z_loss=self._z_loss(logits_TM),
            )

    def _z_loss(self, logits_TM: Tensor) -> Tensor:
        return logits_TM.logsumexp(dim=-1).square().mean() if self.has_z_loss else logits_TM.new_zeros(())


class BiasedRouter(Router):
    """A router with an expert bias, which is added to scores for the selection only and moved by the load."""

    expert_bias_M: Tensor

    def __init__(self, hidden: int, num_experts: int, *others: Any) -> None:
        super().__init__(hidden, num_experts, *others)
        self.register_buffer("expert_bias_M", torch.zeros(num_experts, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, std^2) with `generator`, and set the expert bias to 0."""
        super().reset_parameters(std, generator)
        self.expert_bias_M.zero_()

    @torch.no_grad()
    def update_bias(self, tokens_per_expert_M: Tensor, rate: float) -> None:
        """Move each bias by rate * sign(mean load - load) (Eq. M11).

        Call it once per optimizer step.

        Args:
            tokens_per_expert_M: The assignments in the step, over all ranks and micro-batches: of the layer, or of all
                layers that share the bias.
            rate: Size of the move.
        """
        load_M = tokens_per_expert_M.float()
        self.expert_bias_M.add_(torch.sign(load_M.mean() - load_M), alpha=rate)


class NormRouter(Router):
    """NormRouter (Eq. M7): gate values start near 1, and about half of all scores are 0.

    With K > 1 a token may select experts of score 0; they add nothing but count in `tokens_per_expert_M`. Selection by
    logits relies on a positive sigma, which starts at 1.

    Args:
        constant: The constant c from `norm_constant`, the same for the whole model.
    """

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, scores: Scores, z_loss: bool, constant: float
    ) -> None:
        super().__init__(hidden, num_experts, top_k, scores, z_loss)
        self.constant = constant
        self.sigma = nn.Parameter(torch.ones(1, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, std^2) with `generator`, and set sigma to 1."""
        super().reset_parameters(std, generator)
        self.sigma.fill_(1.0)

    def decide(self, logits_TM: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sigma = self.sigma.float()
        return norm_route(logits_TM, sigma, self.constant, self.top_k, self.normalized, chosen_TK=forced_TK)

    def decide_within(self, logits_TM: Tensor, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        return norm_route(logits_TM, self.sigma.float(), self.constant, self.top_k, self.normalized, reach)


class NormBiasRouter(BiasedRouter, NormRouter):
    """NormRouter with an expert bias that is the same in all layers that share the experts.

    The bias is added to positive scores only (`biased_choice`).
    """

    def decide(self, logits_TM: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sigma, chosen_TK = self.sigma.float(), forced_TK
        if chosen_TK is None:
            chosen_TK = biased_choice(logits_TM, sigma, self.constant, self.top_k, self.expert_bias_M)
        return norm_route(logits_TM, sigma, self.constant, self.top_k, self.normalized, chosen_TK=chosen_TK)


class SoftmaxRouter(Router):
    """The router of the vanilla baseline: softmax over all experts, then top-k (Eq. M9).

    Autograd computes its backward pass, because the matrix of scores is needed anyway.

    Args:
        renormalize: Whether to divide a token's gate values by their sum, as Mixtral does; the paper does not.
        logit_bias: Whether the logits have a learned bias.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        scores: Scores,
        z_loss: bool,
        renormalize: bool = False,
        logit_bias: bool = False,
    ) -> None:
        super().__init__(hidden, num_experts, top_k, scores, z_loss)
        self.renormalize = renormalize
        if logit_bias:
            self.bias_M = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, std^2) with `generator`, and set the bias to 0."""
        super().reset_parameters(std, generator)
        if self.bias_M is not None:
            self.bias_M.zero_()

    def decide(self, logits_TM: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores_TM = logits_TM.softmax(dim=-1)
        broken_T1 = broken_rows(logits_TM)
        gates_TK, ids_TK, mean_scores_M = _decide(
            scores_TM, logits_TM, broken_T1, self.top_k, self.normalized, forced_TK
        )
        if self.renormalize:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return gates_TK, ids_TK, mean_scores_M


class SigmoidBiasRouter(BiasedRouter):
    """Sigmoid gate values, and an expert bias for the selection only (Eq. M10 and M11; arXiv:2408.15664).

    With K > 1 a token's gate values are divided by their sum, as in the paper's released code.

    Autograd computes its backward pass, because the matrix of scores is needed anyway.
    """

    def decide(self, logits_TM: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores_TM = logits_TM.sigmoid()
        preference_TM = scores_TM + self.expert_bias_M
        gates_TK, ids_TK, mean_scores_M = _decide(
            scores_TM, preference_TM, broken_rows(logits_TM), self.top_k, self.normalized, forced_TK
        )
        if self.top_k > 1:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + SIGMOID_EPS)
        return gates_TK, ids_TK, mean_scores_M


def build_router(
    kind: RouterKind,
    hidden: int,
    num_experts: int,
    top_k: int,
    scores: Scores,
    z_loss: bool,
    constant: float,
    renormalize: bool = False,
    logit_bias: bool = False,
) -> Router:
    """Build one layer's router.

    The arguments are those of `Router`, `NormRouter` and `SoftmaxRouter`; the others do not use theirs.

    Raises:
        ValueError: `kind` or `scores` is unknown.
    """
    if scores not in ("raw", "normalized"):
        raise ValueError(f"balance.scores is {scores!r}: it must be raw or normalized")
    match kind:
        case "norm":
            return NormRouter(hidden, num_experts, top_k, scores, z_loss, constant)
        case "norm_bias":
            return NormBiasRouter(hidden, num_experts, top_k, scores, z_loss, constant)
        case "softmax":
            return SoftmaxRouter(hidden, num_experts, top_k, scores, z_loss, renormalize, logit_bias)
        case "sigmoid_bias":
            return SigmoidBiasRouter(hidden, num_experts, top_k, scores, z_loss)
    raise ValueError(f"router.kind is {kind!r}: it must be norm, norm_bias, softmax or sigmoid_bias")
