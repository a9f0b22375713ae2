"""Which layer owns which expert once the pool is locked (UniPool-lock).

Every layer gets exactly K = M / L experts and every expert exactly one layer. Among these partitions, the one is wanted
in which every layer finds at least a given share of its routed tokens inside its own set.

Letters: L layers, M experts in the pool, K experts of a layer. (It is not the top-k.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NODES = 50
"""Nodes of the branch-and-bound tree, a limit that is the same on every machine; nearly all loads need one."""
_SECONDS = 300.0
"""Limit of the 0/1 program on a machine that hangs; with 48 layers and 384 experts it takes seconds."""
_TIE = 1e-8
"""What a rank is worth as a share in the 0/1 program, whose tolerances allow no exact order of both."""


@dataclass(frozen=True)
class Ownership:
    """A partition of the pool over the layers, and how well it fits the load that it was made from.

    Attributes:
        owners: The layer that owns each expert (M).
        shares: The share of each layer's routed tokens that goes to the layer's own experts (L); 1 for a layer without
            tokens.
        shortfalls: What each layer's share lacks of the wanted coverage (L); 0 where nothing is lacking.
        feasible: Whether no layer lacks anything.
    """

    owners: tuple[int, ...]
    shares: tuple[float, ...]
    shortfalls: tuple[float, ...]
    feasible: bool

    @property
    def experts_by_layer(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each layer, in ascending order (L, K)."""
        own: list[list[int]] = [[] for _ in self.shares]
        for expert, layer in enumerate(self.owners):
            own[layer].append(expert)
        return tuple(map(tuple, own))


def assign(load_LM: Tensor, coverage: float) -> Ownership:
    """Give every layer M / L experts of its own, so that at least `coverage` of its tokens stay inside its set.

    Of the partitions with this coverage, the one with the largest sum of shares over the layers is taken; if there is
    none, the one with the largest sum of all. Among equal sums, the smallest sum of ranks decides, where an expert's
    rank in a layer is 0 for the most tokens and, among equal numbers of tokens, for the smallest expert number.

    The largest sum is a transportation problem, solved exactly. Only where its solution lacks coverage is there a 0/1
    program to solve. Its limit is a number of nodes, so that the same load gives the same partition on every machine.

    Args:
        load_LM: Assignments of each layer to the experts of the whole pool: counts, or weighted means of counts.
        coverage: The wanted share, from 0 to 1.

    Raises:
        ValueError: M is not a multiple of L, a load is negative or not finite, or the coverage is out of range.
    """
    layers, experts = load_LM.shape
    _check_partition(layers, experts)
    if not 0 <= coverage <= 1:
        raise ValueError(f"lock.coverage is {coverage}: it must be from 0 to 1")
    load = load_LM.detach().cpu().double().numpy()
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError("the load has entries that are negative or not finite: nothing can be assigned from it")
    shares_LM = load / np.where(load.sum(1) == 0, 1.0, load.sum(1))[:, None]
    wanted_L = np.where(load.sum(1) == 0, 0.0, coverage)
    owners = _largest_sum(shares_LM)
    if _lacking(owners, shares_LM, wanted_L).any():
        covered = _largest_sum_with_coverage(shares_LM, wanted_L)
        owners = owners if covered is None else covered
    lacking_L = _lacking(owners, shares_LM, wanted_L)
    own_L = np.where(load.sum(1) == 0, 1.0, _own_shares(owners, shares_LM))
    return Ownership(tuple(owners.tolist()), tuple(own_L.tolist()), tuple(lacking_L.tolist()), not lacking_L.any())


def random_ownership(layers: int, experts: int, seed: int) -> Ownership:
    """Give every layer M / L random experts, before any token is routed: the control without learning.

    The shares are those of a uniform load, 1 / L, and nothing is asked of them.

    Raises:
        ValueError: The number of experts is not a multiple of the number of layers.
    """
    _check_partition(layers, experts)
    order_M = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    owners_M = torch.empty(experts, dtype=torch.int64)
    owners_M[order_M] = torch.arange(experts) // (experts // layers)
    return Ownership(tuple(owners_M.tolist()), (1 / layers,) * layers, (0.0,) * layers, True)


def _check_partition(layers: int, experts: int) -> None:
    if experts < layers or experts % layers:
        raise ValueError(f"pool.experts is {experts}: it must be a multiple of model.layers ({layers}) to be locked")


def _own_shares(owners: NDArray[np.int64], shares_LM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum each layer's shares of its own experts, in the order of the experts."""
    own_LM = owners == np.arange(len(shares_LM))[:, None]
    sums_L: NDArray[np.float64] = np.where(own_LM, shares_LM, 0.0).sum(1)
    return sums_L.clip(max=1.0)


def _lacking(
    owners: NDArray[np.int64], shares_LM: NDArray[np.float64], wanted_L: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each layer lacks; less than rounding is nothing."""
    lacking_L = wanted_L - _own_shares(owners, shares_LM)
    return np.where(lacking_L > 1e-9, lacking_L, 0.0)


def _ranks(shares_LM: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each expert's rank in each layer, from 0 for the largest share; the smaller number first if equal."""
    order_LM = np.argsort(-shares_LM, axis=1, kind="stable")
    return np.argsort(order_LM, axis=1)


def _largest_sum(shares_LM: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the owners (M) with the largest sum of shares, and among equal sums with the smallest sum of ranks.

    Costs are whole numbers whose sums are exact in float64, so that rounding decides nothing.
    """
    from scipy.optimize import linear_sum_assignment

    layers, experts = shares_LM.shape
    # A sum of ranks is less than experts^2, so it only decides between equal sums of shares.
    resolution = 2 ** math.floor(52 - math.log2(layers * experts**2))
    costs_LM = _ranks(shares_LM) - np.rint(shares_LM * resolution) * experts**2
    per_layer = experts // layers
    rows, columns = linear_sum_assignment(np.repeat(costs_LM, per_layer, axis=0))
    owners_M = np.empty(experts, np.int64)
    owners_M[columns] = rows // per_layer
    return owners_M


def _largest_sum_with_coverage(
    shares_LM: NDArray[np.float64], wanted_L: NDArray[np.float64]
) -> NDArray[np.int64] | None:
    """Return the owners (M) with the largest sum of shares of those that give each layer its wanted share.

    Returns:
        None if there are none, or none was found within the limits.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, experts = shares_LM.shape
    one_owner = sparse.kron(np.ones((1, layers)), sparse.eye_array(experts))
    equal_sets = sparse.kron(sparse.eye_array(layers), np.ones((1, experts)))
    covered = sparse.block_diag(list(shares_LM[:, None]))
    least = np.concatenate([np.ones(experts), np.full(layers, experts // layers), wanted_L])
    most = np.concatenate([least[:-layers], np.full(layers, np.inf)])
    values_LM = shares_LM - _TIE * _ranks(shares_LM)
    found = milp(
        -1e4 * values_LM.ravel(),  # above the solver's absolute tolerances
        integrality=np.ones(layers * experts),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(sparse.vstack([one_owner, equal_sets, covered], format="csc"), least, most),
        options={"node_limit": _NODES, "time_limit": _SECONDS, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    owners_M = found.x.reshape(layers, experts).argmax(0)
    right = (np.bincount(owners_M, minlength=layers) == experts // layers).all()
    return owners_M if right and not _lacking(owners_M, shares_LM, wanted_L).any() else None
