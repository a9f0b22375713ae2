"""What happens after a step's last gradient: reductions, the optimizer, and what the hosts tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.config.recipe import Recipe
from trainer.planning.hardware import Hardware
from trainer.planning.model_costs import FP32, count_parameters, muon_flops
from trainer.planning.network.links import nodes_of


@dataclass(frozen=True)
class StepEnd:
    """Seconds from the last gradient to the next step, on the slower role or for one after the other.

    Attributes:
        reductions: Reductions of the gradients and, with ZeRO, gathering of the new weights.
        optimizer: AdamW or Muon.
        hosts: Sums over the hosts, each of which waits for the one before.
    """

    reductions: float
    optimizer: float
    hosts: float

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.reductions + self.optimizer + self.hosts


def step_end(recipe: Recipe, hardware: Hardware) -> StepEnd:
    """Compute how long the end of a step takes.

    AdamW reads the weight, the gradient and two moments and writes all but the gradient; with ZeRO 1 and above each
    rank updates its part. Muon's products come on top; every rank of a role updates all that it holds.
    """
    parameters, grid, p = count_parameters(recipe), recipe.grid, recipe.parallel

    rates = hardware.rates(recipe.train.precision)
    muon = muon_flops(recipe) if recipe.train.optimizer == "muon" else (0, 0)
    trunk_products, pool_products = (flops / (rates.flops * rates.experts) for flops in muon)

    def role(parameters: float, groups: Sequence[range], zero: int, products: float) -> StepEnd:
        reductions = max(_reduction(recipe, hardware, FP32 * parameters, ranks, zero) for ranks in groups)
        updated = parameters / (len(groups[0]) if zero else 1)
        return StepEnd(reductions, 7 * FP32 * updated / hardware.memory_bandwidth + products, hosts=0.0)

    everyone = range(grid.trunk_ranks)
    first, last = grid.first_pool_rank, grid.world_size
    of_shards = [range(first + shard, last, grid.expert_parallel) for shard in range(grid.expert_parallel)]
    trunk = role(parameters.trunk, [everyone], p.trunk_zero, trunk_products)
    holding = [everyone] if grid.colocated else of_shards
    shard = parameters.pool / grid.expert_parallel
    pool = role(shard, holding, p.pool_zero, pool_products / grid.expert_parallel)
    # Losses and loads are summed over the trunk ranks, then the norm and more over all ranks.
    hosts = hardware.hop * (rounds_of_a_sum(grid.trunk_ranks) + rounds_of_a_sum(grid.world_size))
    if grid.dedicated:
        return replace(max(trunk, pool, key=lambda end: end.seconds), hosts=hosts)
    return StepEnd(trunk.reductions + pool.reductions, trunk.optimizer + pool.optimizer, hosts)


def rounds_of_a_sum(ranks: int) -> int:
    """Most messages that follow each other in `trainer.cluster.process_groups.add_up`."""
    pairing = ranks.bit_length() - 1
    return pairing if ranks == 1 << pairing else pairing + 2


def _reduction(recipe: Recipe, hardware: Hardware, size: float, ranks: range, zero: int) -> float:
    """Seconds in which ranks reduce gradients of `size` bytes and, with ZeRO, gather the new weights.

    Each of n ranks sends (n - 1) / n of the bytes to reduce them, and as many to distribute the result. At ZeRO 1 and 2
    DeepSpeed distributes all gradients to all ranks (`use_multi_rank_bucket_allreduce`), and gathers the weights
    besides. At ZeRO 3 it gathers the weights only, which is counted once a step. NCCL divides the bytes over rings that
    leave a node on different links: those of all its ranks.
    """
    n, links = len(ranks), hardware.links
    passes = 3 if zero in (1, 2) else 2
    node_R = nodes_of(recipe.grid, recipe.topology.order, links.node)
    _, members_N = np.unique(node_R[list(ranks)], return_counts=True)
    bandwidth = links.within if len(members_N) == 1 else min(links.within, members_N.min() * links.between)
    return float(passes * (n - 1) / n * size / bandwidth)
