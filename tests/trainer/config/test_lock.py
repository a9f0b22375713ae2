"""The stages of a lock: their boundaries, the cosine between them, and the warm-up of the entropy loss."""

from __future__ import annotations

import math

import pytest

from trainer.config.lock import assigned_after, locked_after, placed_by_load, stage_of
from trainer.config.recipe import Recipe, load_recipe


def recipe(steps: int, **lock: object) -> Recipe:
    return load_recipe("quickstart", ["lock={}", f"train.steps={steps}", *(f"lock.{k}={v}" for k, v in lock.items())])


def test_boundaries_and_the_cosine() -> None:
    r = recipe(120, full_fraction=0.05, anneal_fraction=0.1)  # 6 steps and 12
    stages = [stage_of(r, step) for step in range(121)]
    assert (assigned_after(r), locked_after(r)) == (6, 18)
    assert [s.name for s in stages] == ["full"] * 6 + ["anneal"] * 12 + ["locked"] * 103
    assert [s.alpha for s in stages[:6]] == [0.0] * 6 and {s.alpha for s in stages[18:]} == {1.0}
    # The first annealed step computes what the full stage does, and the ramp ends where the lock begins.
    assert [s.alpha for s in stages[6:18]] == pytest.approx([math.sin(math.pi * x / 24) ** 2 for x in range(12)])


def test_the_entropy_loss_warms_up_during_the_full_stage() -> None:
    for allocation in ("learned", "random"):
        r = recipe(40, full_fraction=0.1, entropy=0.8, allocation=allocation)
        assert [stage_of(r, step).entropy for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_a_random_allocation_is_locked_from_the_start() -> None:
    r = recipe(600, allocation="random")
    assert (assigned_after(r), locked_after(r)) == (0, 0)
    assert {stage_of(r, step).name for step in range(600)} == {"locked"}


def test_a_short_run_has_a_full_step() -> None:
    r = recipe(3, anneal_fraction=0)
    assert [stage_of(r, step).name for step in range(3)] == ["full", "locked", "locked"]
    assert stage_of(r, 0).entropy == 5e-3


def test_experts_are_placed_by_the_load_of_locked_steps() -> None:
    """Not at the boundary itself, up to which no step was locked."""
    r = recipe(120, full_fraction=0.05, anneal_fraction=0.1)
    assert [placed_by_load(r, done) for done in (0, 17, 18, 19, 120)] == [False] * 3 + [True] * 2
    assert [placed_by_load(recipe(120, allocation="random"), done) for done in (0, 1)] == [False, True]
    assert not placed_by_load(load_recipe("quickstart", []), 100)
    assert placed_by_load(load_recipe("quickstart", ["pool.placement=auto"]), 1)
