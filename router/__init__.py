"""Routers, balance losses and load statistics: pure functions that know no process groups."""

from router.balance import LoadStatistics, balance_coefficients
from router.calibration import norm_constant
from router.load import (
    dead_experts,
    distinct_experts,
    distinct_experts_by_token,
    effective_experts,
    layer_divergence,
    load_imbalance,
    specialisation,
)
from router.ownership import Ownership, assign, random_ownership
from router.routers import (
    NormRouter,
    Router,
    Routing,
    SigmoidBiasRouter,
    SoftmaxRouter,
    build_router,
    select_experts,
)

__all__ = [
    "LoadStatistics",
    "NormRouter",
    "Ownership",
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
    "layer_divergence",
    "load_imbalance",
    "norm_constant",
    "random_ownership",
    "select_experts",
    "specialisation",
]
