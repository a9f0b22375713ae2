"""Routers, balance losses and load statistics: pure functions that know no process groups."""

from router.balance import LoadStatistics, balance_coefficients, load_of_groups
from router.calibration import norm_constant
from router.concentration import entropy_loss
from router.forced import Balanced
from router.load import (
    dead_experts,
    distinct_experts,
    distinct_experts_by_token,
    effective_experts,
    layer_divergence,
    load_imbalance,
    specialisation,
)
from router.norm import Faded, Owned, Reach, owned
from router.ownership import Ownership, assign, random_ownership
from router.routers import (
    BiasedRouter,
    NormBiasRouter,
    NormRouter,
    Router,
    Routing,
    SigmoidBiasRouter,
    SoftmaxRouter,
    build_router,
    select_experts,
)

__all__ = [
    "Balanced",
    "BiasedRouter",
    "Faded",
    "LoadStatistics",
    "NormBiasRouter",
    "NormRouter",
    "Owned",
    "Ownership",
    "Reach",
    "Router",
    "Routing",
    "SigmoidBiasRouter",
    "SoftmaxRouter",
    "assign",
    "balance_coefficients",
    "build_router",
    "dead_experts",
    "distinct_experts",
    "distinct_experts_by_token",
    "effective_experts",
    "entropy_loss",
    "layer_divergence",
    "load_imbalance",
    "load_of_groups",
    "norm_constant",
    "owned",
    "random_ownership",
    "select_experts",
    "specialisation",
]
