"""What the layers reach of the pool: with a lock, step by step (Eq. M36 and M37 of docs/method.md), or by force.

Letters: L layers, M experts in the pool, E experts that a layer owns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router import Balanced, Faded, Owned, Reach, owned
from trainer.config.lock import stage_of
from trainer.config.recipe import Recipe


class Reaches:
    """The reach of every layer. Each tensor has memory of its own, as compiled segments need it (see `PoolMap`).

    Args:
        device: Where the trunk computes.

    Attributes:
        owners_M: The layer that owns each expert, int64 on the host; None before the assignment.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        self._recipe, self._device = recipe, device
        self.owners_M: Tensor | None = None
        self._own_LM: list[Tensor] = []
        self._locked: list[Owned] = []
        self._whole = [Faded(torch.ones(recipe.pool.experts, device=device)) for _ in range(recipe.model.layers)]

    def assign(self, owners: Sequence[int]) -> None:
        """Use an assignment from here on: the layer that owns each expert."""
        self.owners_M = torch.tensor(owners)
        own_LM = self.owners_M == torch.arange(self._recipe.model.layers).unsqueeze(-1)
        self._own_LM = [own_M.to(self._device) for own_M in own_LM]
        ids_LE = [own_M.nonzero().flatten() for own_M in own_LM]
        locked = [owned(ids_E, len(owners)) for ids_E in ids_LE]
        self._locked = [Owned(*(part.to(self._device) for part in reach)) for reach in locked]

    def at(self, step: int) -> Sequence[Reach]:
        """Return what each layer reaches in a step: all of the pool before the assignment, whatever the stage."""
        stage = stage_of(self._recipe, step)
        if self.owners_M is None or stage.name == "full":
            return self._whole
        if stage.name == "locked":
            return self._locked
        return [Faded(torch.where(own_M, 1.0, 1 - stage.alpha)) for own_M in self._own_LM]


def kinds_of_reach(recipe: Recipe, device: torch.device) -> list[Sequence[Reach] | None]:
    """Return an example of each kind of reach that a run will use, for each of which segments are compiled."""
    if recipe.lock is None:
        return [forced_reaches(recipe, device)]
    reaches = Reaches(recipe, device)
    kinds: list[Sequence[Reach] | None] = [] if recipe.lock.allocation == "random" else [reaches.at(0)]
    layers = recipe.model.layers
    reaches.assign([expert * layers // recipe.pool.experts for expert in range(recipe.pool.experts)])
    return [*kinds, reaches.at(recipe.train.steps)]


def forced_reaches(recipe: Recipe, device: torch.device) -> Sequence[Reach] | None:
    """Return what each layer reaches with `router.force`, the same in every step; None without it."""
    if recipe.router.force is None:
        return None
    layers, sharing = recipe.model.layers, recipe.model.layers // recipe.model.groups
    return [Balanced(torch.tensor(layer % sharing, device=device)) for layer in range(layers)]
