"""Experts with a learning rate of their own (`train.pool_lr_factor`), in every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.training import Outcome, assert_same, run_training, tiny
from trainer.config.recipe import Recipe
from trainer.engine.ds_config import scheduled_rate

FACTOR = 0.35


def recipe_of(parallel: dict[str, Any]) -> Recipe:
    train = {"pool_lr_factor": FACTOR, "lr": 3e-2, "weight_decay": 0.3, "warmup_fraction": 0.5, "min_lr": 1e-2}
    return tiny(train=train, parallel=parallel)


@cache
def colocated() -> Outcome:
    return run_training(recipe_of({"trunk_zero": 0, "pool_zero": 0}))


def updated(name: str, weight: Tensor, outcome: Outcome, recipe: Recipe) -> Tensor:
    """AdamW as Eq. M26 and M27 of docs/method.md have it, in float64."""
    t = recipe.train
    m = v = 0.0
    theta, decay = weight.double(), t.weight_decay if weight.ndim > 1 else 0.0
    for n, (scalars, gradients) in enumerate(zip(outcome.scalars, outcome.gradients, strict=True), start=1):
        g = gradients[name].double() * min(1.0, t.clip / (scalars["grad_norm"] + 1e-6))
        rate = scheduled_rate(recipe, n - 1) * (FACTOR if name.startswith("expert/") else 1.0)
        m, v = t.betas[0] * m + (1 - t.betas[0]) * g, t.betas[1] * v + (1 - t.betas[1]) * g * g
        step = m / (1 - t.betas[0] ** n) / ((v / (1 - t.betas[1] ** n)) ** 0.5 + t.eps)
        theta = (1 - rate * decay) * theta - rate * step
    return theta


def test_experts_learn_at_their_own_rate() -> None:
    recipe = recipe_of({})
    before, after = run_training(recipe, steps=0).weights, colocated()
    assert any(name.startswith("expert/") for name in before)
    for name, weight in before.items():
        error = (after.weights[name] - updated(name, weight, after, recipe)).abs().max()
        assert error < 1e-5 * weight.abs().max(), name
    assert [scalars["lr"] for scalars in after.scalars] == pytest.approx([scheduled_rate(recipe, n) for n in range(4)])


@pytest.mark.parametrize(
    "parallel",
    [
        {"trunk_ranks": 2, "pool_zero": 2},
        {"pool_ranks": 2, "expert_parallel": 1, "pool_zero": 1},
        {"trunk_ranks": 2, "pool_ranks": 2, "pool_zero": 0},
        {"layout": "every_rank", "trunk_ranks": 2, "pool_zero": 2},
    ],
    ids=str,
)
def test_in_every_layout_and_after_a_resume_in_another(parallel: dict[str, Any], tmp_path: Path) -> None:
    whole = run_training(recipe_of(parallel), save_to=tmp_path, save_after=2)
    assert_same(colocated(), whole)
    resumed = run_training(recipe_of({"pool_ranks": 1, "pool_zero": 0}), resume_from=tmp_path)
    resumed.scalars[:0], resumed.gradients[:0] = whole.scalars[:2], whole.gradients[:2]
    assert_same(colocated(), resumed)
