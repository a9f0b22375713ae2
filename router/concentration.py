"""The entropy loss of UniPool-lock: it concentrates each layer on as many experts as it will own (Eq. M33 and M34).

Letters: L layers, M experts.
"""

from torch import Tensor

EPS = 1e-8  # of Eq. M34


def entropy_loss(mean_scores_LM: Tensor, coefficient: float, target: float) -> tuple[Tensor, Tensor]:
    """Compute `coefficient` times the mean over the layers of (H_l - target)^2, and its gradient (Eq. M33).

    Args:
        mean_scores_LM: P of Eq. M14, not negative.
        coefficient: Weight of the loss.
        target: Entropy that every layer's mean scores should have, nats: ln of the experts that it will own.

    Returns:
        The loss, a scalar, and d(loss) / d(mean scores), (L, M).
    """
    sum_L1 = mean_scores_LM.sum(dim=-1, keepdim=True) + EPS
    p_LM = mean_scores_LM / sum_L1
    log_LM = (p_LM + EPS).log()
    excess_L1 = -(p_LM * log_LM).sum(dim=-1, keepdim=True) - target
    d_p_LM = -log_LM - p_LM / (p_LM + EPS)  # of the entropy
    d_mean_LM = (d_p_LM - (d_p_LM * p_LM).sum(dim=-1, keepdim=True)) / sum_L1
    loss = coefficient * excess_L1.square().mean()
    return loss, (2 * coefficient / len(p_LM)) * excess_L1 * d_mean_LM
