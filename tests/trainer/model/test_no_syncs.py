"""No segment of the trunk, and no launch of the colocated pool, reads from the device: shown on tensors without values.

At the paper's shapes, two layers deep.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pool import grouped_experts
from pool.placement import contiguous
from pool.shard import ExpertShard
from router import Faded, LoadStatistics, Owned, balance_coefficients, entropy_loss, norm_constant
from tests.host_reads import no_host_reads
from trainer.config.lock import assigned_after
from trainer.config.recipe import Recipe, load_recipe
from trainer.model.lock import Reaches
from trainer.model.micro_batch import (
    Objective,
    PoolMap,
    Request,
    hidden_states,
    train_dense_micro_batch,
    train_micro_batch,
)
from trainer.model.pool_client import LocalPool, PoolClient
from trainer.model.trunk import Trunk

META = torch.device("meta")

CASES: dict[str, list[str]] = {
    "as it is": [],
    "softmax": ["router.kind=softmax", "balance.scores=normalized"],
    "sigmoid": ["router.kind=sigmoid_bias"],
    "two experts a token": ["router.top_k=2", "balance.scores=normalized"],
    "z-loss": ["router.z_loss=0.001", "balance.layer=0.01"],
    "trunk recomputes": ["train.recompute=true"],
    "pool recomputes": ["pool.recompute=true"],
    "own load": ["balance.scope=micro_batch", "balance.delay=0"],
    "vanilla": ["model.groups=2"],
    "annealed": ["lock={}", "balance.scores=normalized"],
    "locked": ["lock={allocation: random}"],
}


class Autocast:
    """In the place of `torch.autocast`, which the meta device does not know."""

    on = False

    def __init__(self, device_type: str, dtype: torch.dtype = torch.bfloat16, enabled: bool = True):
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before, Autocast.on = Autocast.on, self._enabled

    def __exit__(self, *error: object) -> None:
        Autocast.on = self._before


class Casts(TorchFunctionMode):
    """Products in bf16 where autocast would have them so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Autocast.on and func in (F.linear, F.scaled_dot_product_attention):
            args = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "autocast", Autocast)
    with Casts():
        yield


def shallow(name: str, changes: list[str]) -> Recipe:
    return load_recipe(name, ["model.layers=2", *changes])


def trunk_of(recipe: Recipe, document_end: int | None = None) -> Trunk:
    if recipe.model.ffn == "pool" and recipe.router.kind == "norm":
        norm_constant(recipe.experts_per_layer, recipe.router.top_k)  # is kept: it cannot be computed without values
    with META:
        return Trunk(recipe, META, document_end)


def pool_map(recipe: Recipe) -> PoolMap:
    position_M = contiguous(recipe.pool.experts, 1, 1).position_M.to(META)
    reaches = None
    if recipe.lock:
        made = Reaches(recipe, META)
        made.assign([0, 1] * (recipe.pool.experts // 2))
        with no_host_reads():
            reaches = made.at(assigned_after(recipe) + 1)
        assert isinstance(reaches[0], Faded if recipe.lock.allocation == "learned" else Owned)
    return PoolMap(position_M, recipe.experts_per_layer, recipe.model.layers // recipe.model.groups, reaches)


def objective(recipe: Recipe) -> Objective:
    """As a trunk rank's."""
    statistics = LoadStatistics(recipe.balance.scope, recipe.balance.delay, 2, recipe.experts_per_layer)
    statistics.record_step(0, torch.empty(2, recipe.experts_per_layer, dtype=torch.int64, device=META))

    def coefficients(load_LM: Tensor) -> Tensor | None:
        statistics.record_micro_batch(0, load_LM)
        fractions_LM = statistics.fractions(recipe.balance.delay, 1)  # of a later micro-batch: the first may have none
        assert fractions_LM is not None
        return balance_coefficients(fractions_LM, recipe.balance.layer, recipe.balance.pool, recipe.model.groups)

    entropy = partial(entropy_loss, coefficient=0.01, target=2.0) if recipe.lock else None
    return Objective(0.5, coefficients, recipe.router.z_loss, recipe.train.recompute, entropy)


def sequences(recipe: Recipe) -> Tensor:
    return torch.empty(recipe.train.micro_batch, recipe.model.seq_len + 1, dtype=torch.int64, device=META)


def micro_batches(recipe: Recipe, trunk: Trunk, number: int) -> list[Any]:
    """Micro-batches that have not begun."""
    made = pool_map(recipe), sequences(recipe)
    return [train_micro_batch(trunk, *made, index, objective(recipe)) for index in range(number)]


class Echo(PoolClient):
    """The dedicated layout as the trunk sees it: rows are sent, and as many come."""

    def run(self, micro_batches: Any, lane_order: Any, step: int) -> Any:
        values = []
        for one in micro_batches:
            answer_ND = None
            try:
                while True:
                    request: Request = one.send(answer_ND)
                    assert request.rows_ND.device == request.tokens_per_expert.device == META
                    answer_ND = torch.empty_like(request.rows_ND)
            except StopIteration as stop:
                values.append(stop.value)
        return values


@pytest.mark.parametrize("name", ["unipool-182m", "unipool-978m"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_colocated_micro_batch(name: str, changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and weight gradients, one micro-batch at a time and with two lanes in one launch."""
    recipe = shallow(name, changes)
    trunk, experts = trunk_of(recipe), tuple(range(recipe.pool.experts))
    with META:
        shard = ExpertShard(
            experts, recipe.model.hidden, recipe.model.ffn_hidden, torch.bfloat16, recipe.pool.recompute
        )
    monkeypatch.setattr(shard, "_kernels", lambda: grouped_experts)
    for lanes in (1, 2):
        started = micro_batches(recipe, trunk, 2)
        with no_host_reads() as launches:
            results = LocalPool(shard).run(started, range(lanes), 0)
            shard.deferred_dw.drain()
            shard.scale_gradients(0.5)
        assert launches["_grouped_mm"] and len(results) == 2
    assert all(p.grad is not None for p in (*trunk.parameters(), *shard.parameters()))


@pytest.mark.parametrize("name", ["unipool-182m", "unipool-978m"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_segments_of_a_dedicated_trunk(name: str, precision: str, changes: list[str]) -> None:
    recipe = shallow(name, [f"train.precision={precision}", *changes])
    trunk = trunk_of(recipe, document_end=0)
    started = micro_batches(recipe, trunk, 1)
    with no_host_reads():
        Echo().run(started, (0,), 0)
    assert all(p.grad is not None for p in trunk.parameters())


def test_evaluation() -> None:
    recipe = shallow("unipool-182m", [])
    trunk, made = trunk_of(recipe), (pool_map(recipe), sequences(recipe))
    with no_host_reads():
        ((h_BSD, load_LM),) = Echo().run([hidden_states(trunk, made[0], made[1][:, :-1], 0)], (0,), 0)
        loss = trunk.loss(h_BSD, made[1][:, 1:])
    assert loss.device == load_LM.device == META


def test_a_dense_micro_batch() -> None:
    recipe = shallow("dense-182m", [])
    trunk, started = trunk_of(recipe), sequences(recipe)
    coefficients = Objective(0.5, lambda load_LM: None, 0.0, False)
    with no_host_reads():
        (result,) = PoolClient().run([train_dense_micro_batch(trunk, started, coefficients)], (0,), 0)
    parts = (result.gates_L, result.nonfinite_router_tokens, result.tokens_per_expert_LM, *result.scalars.values())
    assert {part.device for part in parts} == {META}
