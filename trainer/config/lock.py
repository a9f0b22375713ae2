"""The stages of a run whose layers come to own their experts (the recipe's section `lock`), by the step alone.

"Eq. M33" and the like are equations of docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe

OWNERSHIP_FILE = "ownership.json"
"""File in a run's folder and in its checkpoints: which layer owns which expert."""

StageName = Literal["full", "anneal", "locked"]
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True)
class Stage:
    """What the lock does in a step.

    Attributes:
        name: `full`: every layer uses the whole pool; `anneal`: the scores of experts that a layer does not own are
            reduced; `locked`: a layer uses its own experts only.
        alpha: By how much these scores are reduced: 0 in the full stage, 1 when locked (Eq. M36).
        entropy: Coefficient of the entropy loss (Eq. M33).
    """

    name: StageName
    alpha: float
    entropy: float


def assigned_after(recipe: Recipe) -> int:
    """Return the steps after which experts are assigned to layers; 0 if they are from the start (`random`)."""
    assert recipe.lock
    return 0 if recipe.lock.allocation == "random" else _full_steps(recipe)


def locked_after(recipe: Recipe) -> int:
    """Return the steps after which layers use their own experts only."""
    assert recipe.lock
    if recipe.lock.allocation == "random":
        return 0
    return _full_steps(recipe) + round(recipe.lock.anneal_fraction * recipe.train.steps)


def placed_by_load(recipe: Recipe, done: int) -> bool:
    """Return whether the experts are placed by the recorded load after `done` steps: also where layers are locked."""
    return recipe.pool.placement == "auto" or (recipe.lock is not None and done > locked_after(recipe))


def stage_of(recipe: Recipe, step: int) -> Stage:
    """Return the stage of optimizer step `step`, counted from 0. An evaluation after n steps has that of step n."""
    assert recipe.lock
    first, locked = assigned_after(recipe), locked_after(recipe)
    entropy = recipe.lock.entropy * min(1.0, (step + 1) / _full_steps(recipe))
    if step < first:
        return Stage("full", 0.0, entropy)
    if step >= locked:
        return Stage("locked", 1.0, entropy)
    return Stage("anneal", (1 - math.cos(math.pi * (step - first) / (locked - first))) / 2, entropy)


def _full_steps(recipe: Recipe) -> int:
    assert recipe.lock
    return max(1, round(recipe.lock.full_fraction * recipe.train.steps))
