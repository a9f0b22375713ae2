"""Load statistics for metrics: how evenly tokens spread over experts, and how differently the layers use them.

Where a docstring says nothing else, a function takes int64 counts of any shape (..., M) and reduces the last dimension,
the experts.
"""

import math

import torch
from torch import Tensor


def load_imbalance(tokens_per_expert: Tensor) -> Tensor:
    """Largest load over mean load, fp32, from 1 (even) to M (one expert has all); 1 without tokens. MaxVio + 1."""
    load = tokens_per_expert.float()
    mean = load.mean(dim=-1)
    return torch.where(mean == 0, 1.0, load.amax(dim=-1) / mean)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """How many experts got no token, int64."""
    return (tokens_per_expert == 0).sum(dim=-1)


def effective_experts(tokens_per_expert: Tensor) -> Tensor:
    """exp of the load's entropy, fp32: n when n experts share the tokens evenly and the rest get none.

    1 without tokens, the smallest value there is.
    """
    load = tokens_per_expert.float()
    fractions = load / load.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy: Tensor = torch.special.entr(fractions).sum(dim=-1)
    return entropy.exp()


def distinct_experts(expert_ids_LTK: Tensor) -> Tensor:
    """Different experts of the pool that a token meets over its layers: mean over the tokens, fp32."""
    return distinct_experts_by_token(expert_ids_LTK).float().mean()


def distinct_experts_by_token(expert_ids_LTK: Tensor) -> Tensor:
    """Different experts of the pool that each token meets over its layers, int64 (T).

    Args:
        expert_ids_LTK: global expert ids by layer, token and choice.
    """
    ids_TN = expert_ids_LTK.transpose(0, 1).flatten(1).sort(dim=-1).values
    return 1 + (ids_TN.diff(dim=-1) != 0).sum(dim=-1)


def layer_divergence(counts_LM: Tensor) -> Tensor:
    """Jensen-Shannon divergence of every two layers' shares, bits, float64 (L, L): 0 the same, 1 nothing in common.

    Args:
        counts_LM: assignments of each layer to the experts of the whole pool.
    """
    p_LM = counts_LM.double() / counts_LM.sum(1, keepdim=True).clamp(min=1)
    entropy_L = torch.special.entr(p_LM).sum(1)
    both_LL = torch.stack([torch.special.entr((p_LM + row) / 2).sum(1) for row in p_LM])
    bits_LL: Tensor = (both_LL - (entropy_L[:, None] + entropy_L) / 2) / math.log(2)
    return bits_LL.clamp_(0, 1).fill_diagonal_(0)


def specialisation(counts_LM: Tensor) -> float:
    """How differently the layers use the pool: the mean of `layer_divergence` over all pairs; 0 for one layer."""
    layers = len(counts_LM)
    return float(layer_divergence(counts_LM).sum()) / max(1, layers * (layers - 1))
