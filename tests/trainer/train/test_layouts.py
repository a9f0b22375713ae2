"""Numbers do not depend on the layout (docs/design.md): every layout gives those of one colocated process."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pool.placement import contiguous
from tests.training import Outcome, assert_same, run_training, tiny
from trainer.model.micro_batch import PoolMap, hidden_states
from trainer.model.trunk import Trunk

LOSSES = Path(__file__).parents[2] / "golden" / "losses.json"
ZERO_0 = {"trunk_zero": 0, "pool_zero": 0}
LOCK_STEP = {"lanes": 1, "stagger": False}
EVERY = {"layout": "every_rank", "trunk_ranks": 2}


@cache
def colocated() -> Outcome:
    """One process, ZeRO 0, one lane: the reference. Four micro-batches a step."""
    return run_training(tiny(parallel={**ZERO_0, **LOCK_STEP}))


def losses_of(outcome: Outcome) -> dict[str, list[float]]:
    """What tests/golden/losses.json has of a run."""
    found = {name: [scalars[name] for scalars in outcome.scalars] for name in ("loss", "grad_norm")}
    return found | {"validation": [outcome.val_loss, outcome.random_loss]}


def assert_losses(method: str, outcome: Outcome) -> None:
    """They are still those of the file, but for the rounding of another CPU."""
    golden = json.loads(LOSSES.read_text())[method]
    for name, values in losses_of(outcome).items():
        assert values == pytest.approx(golden[name], rel=1e-4, abs=0), name


def test_losses_are_what_they_were() -> None:
    assert_losses("unipool", colocated())


@pytest.mark.parametrize(
    "parallel",
    [
        {"trunk_ranks": 2},
        {"pool_ranks": 1},
        {"trunk_ranks": 2, "pool_ranks": 1},
        {"pool_ranks": 2},
        {"trunk_ranks": 2, "pool_ranks": 2},
        {"pool_ranks": 2, "expert_parallel": 1},
        {"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1},
        {"lanes": 4},
        {"pool_ranks": 1, "lanes": 3},
        {"pool_ranks": 1, **LOCK_STEP},
        {"trunk_ranks": 2, "pool_ranks": 1, **LOCK_STEP},
        {"trunk_ranks": 2, "pool_ranks": 2, "lanes": 3, "stagger": False},
        EVERY,
        {**EVERY, **LOCK_STEP},
        {**EVERY, "expert_parallel": 1, "lanes": 2},
        {**EVERY, "trunk_ranks": 4, "expert_parallel": 2},
    ],
    ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()),
)
def test_layout(parallel: dict[str, Any]) -> None:
    assert_same(colocated(), run_training(tiny(parallel={**ZERO_0, **parallel})))


@pytest.mark.parametrize("trunk_ranks, micro_batch", [(1, 8), (1, 4), (2, 4), (2, 1), (4, 2)])
def test_split_of_the_global_batch(trunk_ranks: int, micro_batch: int) -> None:
    """With the global-batch balance statistic the cut into trunk ranks and micro-batches does not show."""
    parallel = {**ZERO_0, "trunk_ranks": trunk_ranks, "pool_ranks": 0 if trunk_ranks == 4 else 1}
    assert_same(colocated(), run_training(tiny(train={"micro_batch": micro_batch}, parallel=parallel)))


@pytest.mark.parametrize(
    "trunk_zero, pool_zero, parallel",
    [
        (1, 2, {"trunk_ranks": 2}),
        (0, 1, {"pool_ranks": 2, "expert_parallel": 1}),
        (1, 0, {"trunk_ranks": 2, "pool_ranks": 2}),
        (2, 2, {"trunk_ranks": 2, "pool_ranks": 2, "expert_parallel": 1}),
        (2, 1, {**EVERY, "expert_parallel": 1}),
        (3, 1, {"trunk_ranks": 2, "pool_ranks": 1, **LOCK_STEP}),
        (3, 2, {"trunk_ranks": 2}),
        (3, 0, {**EVERY, **LOCK_STEP}),
    ],
)
def test_zero_stages(trunk_zero: int, pool_zero: int, parallel: dict[str, Any]) -> None:
    recipe = tiny(parallel={"trunk_zero": trunk_zero, "pool_zero": pool_zero, **parallel})
    assert_same(colocated(), run_training(recipe))


@pytest.mark.parametrize("sections", [{"pool": {"recompute": True}}, {"train": {"recompute": True}}], ids=str)
def test_recompute_is_exact(sections: dict[str, Any]) -> None:
    parallel = {**ZERO_0, **LOCK_STEP}
    assert_same(colocated(), run_training(tiny(parallel=parallel, **sections)), tolerance=0.0)


def test_every_rank_recomputes_masks_checks_and_warms_up() -> None:
    """All that is done differently there, at once."""
    sections = {"pool": {"recompute": True}, "train": {"recompute": True}, "data": {"document_mask": True}}
    sections["data"] |= {"source": "unused", "tokenizer": "unused"}
    masked = run_training(tiny(parallel=ZERO_0, data=sections["data"]))
    every = tiny(parallel={**ZERO_0, **EVERY, "lanes": 2, "check": True}, **sections)
    assert_same(masked, run_training(every, warm_up=True))


def test_gates_begin_with_the_constant_factor() -> None:
    """Those of layer 0: it sees the same tokens."""
    half = run_training(tiny(parallel=ZERO_0, router={"constant_factor": 0.5}), steps=1)
    paper, ours = (outcome.scalars[0]["gate of layer 0"] for outcome in (colocated(), half))
    assert paper > 0.5 and ours == pytest.approx(0.5 * paper)


@pytest.mark.parametrize("parallel", [{"trunk_ranks": 2, "pool_ranks": 2}, EVERY], ids=["dedicated", "every_rank"])
def test_same_command_twice_is_bit_for_bit_the_same(parallel: dict[str, Any]) -> None:
    recipe = tiny(parallel={**parallel, "lanes": 3})
    assert_same(run_training(recipe), run_training(recipe), tolerance=0.0)


METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {
        "model": {"groups": 3},
        "pool": {"experts": 12},
        "router": {"kind": "softmax"},
        "balance": {"layer": 0.05},
    },
    "sigmoid_bias": {
        "router": {"kind": "sigmoid_bias", "bias_rate": 0.01, "z_loss": 1e-2},
        "balance": {"pool": 0.0},
    },
    "norm_bias": {"router": {"kind": "norm_bias", "bias_rate": 0.05}, "balance": {"pool": 0.0}},
    "private-expert": {"model": {"private_ffn": 7}},
    "normalized-delay-2": {"balance": {"scores": "normalized", "delay": 2}},
    "micro-batch-exact": {"balance": {"scope": "micro_batch", "delay": 0}},
    "micro-batch-delay-1": {"balance": {"scope": "micro_batch", "delay": 1}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_a_dedicated_layout(method: str) -> None:
    sections = METHODS[method]
    colocated = run_training(tiny(parallel=ZERO_0, **sections))
    assert_losses(method, colocated)
    assert_same(colocated, run_training(tiny(parallel={**ZERO_0, "pool_ranks": 2}, **sections)))
    balance = sections.get("balance", {})
    if balance.get("pool", 1):
        assert colocated.scalars[-1]["balance_loss"] > 0
        first = colocated.scalars[0]["balance_loss"]
        assert (first > 0) == (balance.get("scope") == "micro_batch")


def test_dense_baseline_needs_no_pool() -> None:
    sections = {"model": {"ffn": "dense"}, "pool": {"experts": 0}}
    one = run_training(tiny(parallel=ZERO_0, **sections))
    assert_same(one, run_training(tiny(parallel={**ZERO_0, "trunk_ranks": 2, "trunk_zero": 2}, **sections)))
    assert one.scalars[-1]["loss"] < one.scalars[0]["loss"]


def test_a_shard_without_tokens_and_experts_nobody_picks() -> None:
    """More experts than assignments in a step: some get none, on one of three shards all the time."""
    sections = {"pool": {"experts": 96}, "train": {"global_batch": 1, "micro_batch": 1}, "router": {"top_k": 1}}
    one = run_training(tiny(parallel=ZERO_0, **sections))
    assert (one.load_LM.sum(0) == 0).any()
    assert_same(one, run_training(tiny(parallel={**ZERO_0, "pool_ranks": 3}, **sections)))


def test_bf16_tracks_fp32() -> None:
    """bf16 computes in 8 bits of mantissa on fp32 master weights: the loss curve stays close while it falls.

    How close, rounding decides, which differs from CPU to CPU; that it is bf16, a request's dtype says.
    """
    sections = {"model": {"init_std": 0.05, "ffn_hidden": 24}, "parallel": {"pool_ranks": 1}}
    steps = {"steps": 12, "warmup_fraction": 0.2, "eps": 1e-8, "lr": 1e-2}
    fp32 = run_training(tiny(train=steps, **sections))
    bf16 = run_training(tiny(train={**steps, "precision": "bf16"}, **sections))
    losses = torch.tensor([[s["loss"] for s in o.scalars] for o in (fp32, bf16)])
    gap = (losses[0] - losses[1]).abs()
    assert gap.max() < 0.05
    assert losses[1, -1] < losses[1, 0] - 0.4
    assert all(weight.dtype == torch.float32 for weight in bf16.weights.values())
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        recipe = tiny(train={**steps, "precision": precision}, **sections)
        order = contiguous(recipe.pool.experts, 1, 1).position_M
        pool_map = PoolMap(order, recipe.experts_per_layer, recipe.model.layers)
        trunk, ids_BS = Trunk(recipe, torch.device("cpu")), torch.zeros(1, 5, dtype=torch.int64)
        assert next(hidden_states(trunk, pool_map, ids_BS, 0)).rows_ND.dtype == dtype


@pytest.mark.parametrize("parallel", [{}, {"pool_ranks": 1}, EVERY], ids=["colocated", "dedicated", "every_rank"])
def test_bf16_experts_compute_with_the_weights_of_the_last_step(parallel: dict[str, Any], tmp_path: Path) -> None:
    """An evaluation after a step is that of a process that has just read the step's checkpoint."""
    sections = {"model": {"ffn_hidden": 24}, "train": {"precision": "bf16", "lr": 0.1, "min_lr": 0.1}}
    recipe = tiny(parallel={**ZERO_0, **parallel}, **sections)
    trained = run_training(recipe, 1, save_to=tmp_path)
    loaded = run_training(recipe, 1, resume_from=tmp_path)
    assert (trained.val_loss, trained.random_loss) == (loaded.val_loss, loaded.random_loss)


def test_a_step_that_is_not_finite_is_skipped_on_both_roles() -> None:
    """An absurd learning rate blows up; from then on every step is skipped and the weights stay what they were."""
    sections = {"train": {"lr": 1e36, "min_lr": 1e36, "eps": 1e-8, "clip": 0.0}}
    outcome = run_training(tiny(parallel={"pool_ranks": 1, "trunk_zero": 1, "pool_zero": 0}, **sections))
    applied = [s["applied"] for s in outcome.scalars]
    assert applied[0] == 1 and applied[-1] == 0
    assert all(torch.isfinite(weight).all() for weight in outcome.weights.values())
