"""Load statistics for metrics: how evenly tokens spread over experts, and how differently the layers use them.

Unless a docstring says otherwise, a function takes int64 counts of any shape (..., M) and reduces the last dimension,
the experts. "Eq. M29" and the like are equations of docs/method.md.
"""

import math

import torch
from torch import Tensor


def load_imbalance(tokens_per_expert: Tensor) -> Tensor:
    """Compute the largest load over the mean load (Eq. M29), fp32: 1 if it is even, M if one expert has all tokens.

    Returns:
        1 where there are no tokens.
    """
    load = tokens_per_expert.float()
    mean = load.mean(dim=-1)
    return torch.where(mean == 0, 1.0, load.amax(dim=-1) / mean)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """Count the experts that got no token, int64."""
    return (tokens_per_expert == 0).sum(dim=-1)


def effective_experts(tokens_per_expert: Tensor) -> Tensor:
    """Compute exp of the load's entropy (Eq. M30), fp32: n if n experts share the tokens evenly and the rest get none.

    Returns:
        1, the smallest possible value, where there are no tokens.
    """
    load = tokens_per_expert.float()
    fractions = load / load.sum(dim=-1, keepdim=True).clamp(min=1.0)
    entropy: Tensor = torch.special.entr(fractions).sum(dim=-1)
    return entropy.exp()


def distinct_experts(expert_ids_LTK: Tensor) -> Tensor:
    """Count the distinct experts of the pool that a token meets over its layers (Eq. M31): mean over tokens, fp32."""
    return distinct_experts_by_token(expert_ids_LTK).float().mean()


def distinct_experts_by_token(expert_ids_LTK: Tensor) -> Tensor:
    """Count the distinct experts of the pool that each token meets over its layers (Eq. M31), int64 (T).

    Args:
        expert_ids_LTK: Global expert ids by layer, token and choice.
    """
    ids_TN = expert_ids_LTK.transpose(0, 1).flatten(1).sort(dim=-1).values
    return 1 + (ids_TN.diff(dim=-1) != 0).sum(dim=-1)


def layer_divergence(counts_LM: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of the loads of every two layers (Eq. M32), in bits: float64, (L, L).

    0 means that two layers use the pool alike, 1 that they have no expert in common.

    Args:
        counts_LM: Assignments of each layer to the experts of the whole pool, int64.
    """
    p_LM = counts_LM.double() / counts_LM.sum(1, keepdim=True).clamp(min=1)
    entropy_L = torch.special.entr(p_LM).sum(1)
    both_LL = torch.stack([torch.special.entr((p_LM + row) / 2).sum(1) for row in p_LM])
    bits_LL: Tensor = (both_LL - (entropy_L[:, None] + entropy_L) / 2) / math.log(2)
    return bits_LL.clamp_(0, 1).fill_diagonal_(0)


def specialisation(counts_LM: Tensor) -> float:
    """Compute the mean of `layer_divergence` over all pairs of layers, bits; 0 for a single layer."""
    layers = len(counts_LM)
    return float(layer_divergence(counts_LM).sum()) / max(1, layers * (layers - 1))
