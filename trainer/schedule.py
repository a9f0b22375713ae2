"""The service plans of a recipe, from nominal costs: the same on every rank, and on every start of the run."""

from __future__ import annotations

from dataclasses import dataclass

from pool.plan import Plan, forward_only_plan
from pool.simulate import Costs, evaluation_plan, training_plan
from trainer.config import Recipe
from trainer.costs import count_flops

LAUNCH_SHARE = 0.1
"""Cost of a slot however small, as a share of one request's: the weights' way through memory."""
TRANSFER_SHARE = 0.1
"""Cost of a request's way over the wire, as a share of a trunk layer's."""


def nominal_costs(recipe: Recipe) -> Costs:
    """Costs of one micro-batch's pieces, in FLOPs a token of a rank of either role."""
    flops = count_flops(recipe)
    trunk_layer = flops.trunk_layer + flops.router
    pool_layer = recipe.router.top_k * flops.expert / recipe.topology.expert_parallel
    return Costs(
        trunk_layer=trunk_layer,
        head=flops.head,
        pool_layer=pool_layer,
        slot=LAUNCH_SHARE * pool_layer,
        transfer=TRANSFER_SHARE * trunk_layer,
    )


def plan_step(recipe: Recipe) -> Plan:
    """The plan of an optimizer step."""
    p = recipe.parallel
    return training_plan(
        recipe.topology, recipe.model.layers, recipe.micro_batches, p.lanes, p.stagger, nominal_costs(recipe)
    )


@dataclass(frozen=True)
class Prediction:
    """How a step would go in another way of scheduling.

    Attributes:
        slowdown: predicted time of a step over that of the busier side's work alone.
        trunk_busy, pool_busy: shares of the step in which either side works.
        requests_a_slot: how many requests the pool serves in one launch, on average.
    """

    lanes: int
    stagger: bool
    slowdown: float
    trunk_busy: float
    pool_busy: float
    requests_a_slot: float


def predict(recipe: Recipe) -> tuple[Prediction, ...]:
    """Lock step, and 1 to 4 lanes with stagger, at nominal costs and an even load."""
    predictions = []
    for lanes, stagger in ((1, False), (1, True), (2, True), (3, True), (4, True)):
        parallel = recipe.parallel.model_copy(update={"lanes": lanes, "stagger": stagger})
        plan = plan_step(recipe.model_copy(update={"parallel": parallel}))
        served = [len(slot) for slot in plan.slots if slot]
        predictions.append(
            Prediction(
                lanes,
                stagger,
                1 / max(plan.trunk_busy, plan.pool_busy),
                plan.trunk_busy,
                plan.pool_busy,
                sum(served) / len(served),
            )
        )
    return tuple(predictions)


def plan_evaluation(recipe: Recipe, micro_batches: int) -> Plan:
    """The plan of an evaluation on `micro_batches` of each trunk rank."""
    layers, lanes = recipe.model.layers, recipe.parallel.lanes
    return evaluation_plan(recipe.topology, layers, micro_batches, lanes, nominal_costs(recipe))


def plan_generation(recipe: Recipe, tokens: int) -> Plan:
    """The plan of a generation on every trunk rank: each token waits for the one before."""
    layers, ranks = recipe.model.layers, recipe.topology.trunk_ranks
    slots = tuple(forward_only_plan(range(ranks), tokens, layers))
    return Plan(slots, ((0,) * (layers + 1),) * ranks, 0.0, 0.0, 0.0)
