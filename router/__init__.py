"""Routers, balance losses and load statistics: pure functions that know no process groups."""

from router.balance import LoadStatistics, balance_coefficients, load_of_groups
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
    "BiasedRouter",
    "LoadStatistics",
    "NormBiasRouter",
    "NormRouter",
    "Router",
    "Routing",
    "SigmoidBiasRouter",
    "SoftmaxRouter",
    "balance_coefficients",
    "build_router",
    "dead_experts",
    "distinct_experts",
    "distinct_experts_by_token",
    "effective_experts",
    "layer_divergence",
    "load_imbalance",
    "load_of_groups",
    "norm_constant",
    "select_experts",
    "specialisation",
]
