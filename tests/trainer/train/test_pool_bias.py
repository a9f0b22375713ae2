"""The expert bias of the pool (`router.kind: norm_bias`): one for all layers that share experts, in every layout."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import assert_same, run_training, tiny
from trainer.checkpoint.format import newest
from trainer.checkpoint.reshard import SavedCheckpoint, convert
from trainer.config.recipe import Recipe

RATE = 0.05
COLOCATED = {"trunk_zero": 0, "pool_zero": 0}


def recipe_of(parallel: dict[str, Any], groups: int = 1) -> Recipe:
    router = {"kind": "norm_bias", "top_k": 2, "bias_rate": RATE}
    return tiny(router=router, model={"layers": 4, "groups": groups}, balance={"pool": 0.0}, parallel=parallel)


def biases(folder: Path) -> Tensor:
    """Those of a checkpoint, by layer."""
    found = newest(folder)
    assert found
    with tempfile.TemporaryDirectory() as work:
        convert(found[1], Path(work))
        saved = SavedCheckpoint(found[1], Path(work))
        return torch.stack([saved.trunk.weight(f"blocks.{layer}.router.expert_bias_M") for layer in range(4)])


@pytest.mark.parametrize(
    ("groups", "parallel"),
    [
        (1, COLOCATED),
        (2, {"trunk_ranks": 2, "pool_ranks": 2, "trunk_zero": 3, "pool_zero": 1, "lanes": 1, "stagger": False}),
        (1, {"layout": "every_rank", "trunk_ranks": 2, "trunk_zero": 2}),
    ],
    ids=["colocated", "2 groups, 2+2, ZeRO-3", "every rank"],
)
def test_layers_of_a_group_have_one_bias(groups: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    """It moves once a step, towards an even sum of their loads; a sum that is even leaves it where it is."""
    expected = torch.zeros(4, 8 // groups)
    for steps in (1, 2):
        outcome = run_training(recipe_of(parallel, groups), steps, save_to=tmp_path / str(steps))
        for layer in range(4):
            first = layer // (4 // groups) * (4 // groups)
            load = [int(n) for n in outcome.load_LM[first : first + 4 // groups].sum(0)]
            for expert, n in enumerate(load):
                mean = sum(load) / len(load)
                expected[layer, expert] += RATE * ((n < mean) - (n > mean))
        torch.testing.assert_close(biases(tmp_path / str(steps)), expected)
    assert expected.abs().max() == 2 * RATE


def test_the_layout_changes_nothing_and_a_run_resumes(tmp_path: Path) -> None:
    whole = run_training(recipe_of(COLOCATED))
    dedicated = {"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1, "trunk_zero": 1}
    assert_same(whole, run_training(recipe_of(dedicated), save_to=tmp_path, save_after=2))
    rest = replace(whole, scalars=whole.scalars[2:], gradients=whole.gradients[2:])
    assert_same(rest, run_training(recipe_of({"pool_ranks": 1, "trunk_zero": 2}), resume_from=tmp_path))
    again = run_training(recipe_of(dedicated), resume_from=tmp_path)
    assert_same(again, run_training(recipe_of(dedicated), resume_from=tmp_path), tolerance=0.0)
    assert_same(rest, again)
