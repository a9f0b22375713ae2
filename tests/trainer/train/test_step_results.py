"""A step's scalars, compared with arithmetic by hand on what its micro-batches report."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pool.placement import Placement
from tests.training import tiny
from trainer.cluster.process_groups import Job
from trainer.model.micro_batch import MicroBatchResult
from trainer.train.step_results import lock_scalars, over_all_experts, reduce_results, step_scalars

RECIPE = tiny(model={"layers": 2, "groups": 2}, pool={"experts": 4}, router={"kind": "softmax", "top_k": 1})
NAMES = ("loss", "balance_loss", "z_loss", "distinct_experts")


def result(values: tuple[float, ...], gates_L: list[float], nonfinite: int, load_LM: list[list[int]]) -> Any:
    scalars = {name: torch.tensor(value) for name, value in zip(NAMES, values, strict=True)}
    return MicroBatchResult(scalars, torch.tensor(gates_L), torch.tensor(nonfinite), torch.tensor(load_LM))


def two_ranks() -> Job:
    """A role of two ranks, of which the other reports the same."""
    return cast(Job, SimpleNamespace(role_size=2, sum_over_role=lambda together: together.mul_(2)))


RESULTS = [
    result((2.0, 0.5, 0.25, 1.0), [0.25, 1.0], 3, [[6, 1], [0, 1]]),
    result((4.0, 1.5, 0.75, 2.0), [0.75, 0.5], 4, [[0, 1], [0, 3]]),
]


def test_results_are_reduced_over_micro_batches_and_ranks() -> None:
    found = reduce_results(RESULTS, [torch.tensor(0.1), torch.tensor(-1.0)], two_ranks())
    assert found.means == {"loss": 3.0, "balance_loss": 1.0, "z_loss": 0.5, "distinct_experts": 1.5}
    assert found.gates_L == [0.5, 0.75]
    assert found.nonfinite_router_tokens == 14
    assert found.load_LM.tolist() == [[12, 4], [0, 8]]
    assert found.own_losses == [2.0, 4.0]
    assert found.norms == [float(torch.tensor(0.1)), -1.0], "the bits of fp32"


def test_scalars() -> None:
    results = reduce_results(RESULTS, [torch.tensor(0.1), torch.tensor(-1.0)], two_ranks())
    load_LM = over_all_experts(results.load_LM, 2)
    assert load_LM.tolist() == [[12, 4, 0, 0], [0, 0, 0, 8]]
    scalars = step_scalars(
        RECIPE,
        Placement((0, 3, 1, 2), 2),
        results,
        grad_norm=7.0,
        lr=0.125,
        seconds=2.0,
        seconds_waiting=0.5,
        applied=True,
    )
    tokens = RECIPE.train.global_batch * RECIPE.model.seq_len
    wanted = {
        "loss": 3.0,
        "grad_norm": 7.0,
        "lr": 0.125,
        "tokens": tokens,
        "tokens_per_second": tokens / 2,
        "load_imbalance": 12 / 6,
        "shard_imbalance": pytest.approx(20 / 12),
        "layer_imbalances": (1.5, 2.0),
        "layer_imbalance": 1.75,
        "layer_gates": (0.5, 0.75),
        "layer_gate": 0.625,
        "smallest_gate": 0.5,
        "dead_experts": 1,
        "specialisation": 1.0,
        "nonfinite_router_tokens": 14,
        "pool_wait": 0.25,
        "applied": True,
    }
    assert {name: getattr(scalars, name) for name in wanted} == wanted
    entropy = -sum(share * math.log(share) for share in (12 / 24, 4 / 24, 8 / 24))
    assert scalars.effective_experts == pytest.approx(math.exp(entropy))


def test_scalars_of_a_lock() -> None:
    """What a layer's own experts get, and foreign assignments only once there must be none."""
    recipe = tiny(pool={"experts": 6}, lock={"full_fraction": 0.25, "anneal_fraction": 0.5})  # of 4 steps
    load_LM = torch.tensor([[3, 0, 0, 1, 0, 0], [0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 4]])
    owners_M = torch.tensor([0, 0, 1, 1, 2, 2])
    assert lock_scalars(recipe, 0, load_LM, None) == {"lock_stage": 0}
    shares = {"own_share": 0.75, "layer_own_shares": (0.75, 0.5, 1.0)}
    assert lock_scalars(recipe, 1, load_LM, owners_M) == {"lock_stage": 1, **shares}
    assert lock_scalars(recipe, 3, load_LM, owners_M) == {"lock_stage": 2, **shares, "foreign_assignments": 3}
