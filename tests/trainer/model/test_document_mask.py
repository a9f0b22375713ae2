"""`data.document_mask`: the documents of a row give the same results as each alone, in training and elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import END, assert_same, run_training, tiny, tokens
from trainer.checkpoint.resume import affects_results
from trainer.config.recipe import Recipe
from trainer.engine.experts import build_shard, reduce_expert_gradients
from trainer.model.document_mask import document_mask
from trainer.model.micro_batch import Objective, PoolMap, hidden_states, train_dense_micro_batch, train_micro_batch
from trainer.model.pool_client import LocalPool, PoolClient
from trainer.model.trunk import Trunk

CPU = torch.device("cpu")
MASKED: dict[str, Any] = {"data": {"document_mask": True}}
MODELS: dict[str, dict[str, Any]] = {
    "pool": {},
    "recompute": {"train": {"recompute": True}, "pool": {"recompute": True}},
    "dense": {"model": {"ffn": "dense"}, "pool": {"experts": 0}},
}


def documents_of(row_S1: Tensor) -> list[tuple[int, int]]:
    """(first, behind the last) place of every document among a row's inputs, by a plain loop."""
    found, first = [], 0
    for place, token in enumerate(row_S1[:-1].tolist()):
        if token == END:
            found.append((first, place + 1))
            first = place + 1
    return [*found, (first, len(row_S1) - 1)] if first < len(row_S1) - 1 else found


def trained(recipe: Recipe, batches: list[tuple[Tensor, float]], end: int | None) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of (rows, weight) each, summed by weight."""
    trunk = Trunk(recipe, CPU, end)
    loss = 0.0
    if recipe.model.ffn == "dense":
        for rows_BS1, weight in batches:
            coroutine = train_dense_micro_batch(trunk, rows_BS1, Objective(weight, lambda _: None, 0.0, False))
            (result,) = PoolClient().run([coroutine], (), 0)
            loss += weight * float(result.scalars["loss"])
        return loss, {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    from pool.placement import contiguous

    placement = contiguous(recipe.pool.experts, 1, 1)
    shard = build_shard(recipe, placement, 0, CPU)
    pool_map = PoolMap(placement.position_M, recipe.experts_per_layer, recipe.model.layers)
    for number, (rows_BS1, weight) in enumerate(batches):
        objective = Objective(weight, lambda _: None, 0.0, recipe.train.recompute)
        coroutine = train_micro_batch(trunk, pool_map, rows_BS1, number, objective)
        (result,) = LocalPool(shard).run([coroutine], (0,), 0)
        loss += weight * float(result.scalars["loss"])
    reduce_expert_gradients(shard, recipe)
    both = {**dict(trunk.named_parameters()), **{f"pool {n}": p for n, p in shard.named_parameters()}}
    return loss, {name: p.grad for name, p in both.items() if p.grad is not None}


@pytest.mark.parametrize("model", MODELS)
def test_a_packed_row_is_its_documents_one_by_one(model: str) -> None:
    """Loss and every gradient; also a row that begins with an end, and two ends in a row (an empty document)."""
    recipe = tiny(**MODELS[model], balance={"pool": 0.0})
    rows_BS1 = torch.from_numpy(tokens(recipe)[:5])
    rows_BS1[0, 0] = rows_BS1[1, 3] = rows_BS1[1, 4] = END
    length = rows_BS1.shape[1] - 1
    alone = [
        (row_S1[None, first : last + 1], (last - first) / (length * len(rows_BS1)))
        for row_S1 in rows_BS1
        for first, last in documents_of(row_S1)
    ]
    assert len(alone) > len(rows_BS1) + 4
    packed_loss, packed = trained(recipe, [(rows_BS1, 1.0)], END)
    alone_loss, expected = trained(recipe, alone, None)
    unmasked_loss, _ = trained(recipe, [(rows_BS1, 1.0)], None)
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    assert abs(packed_loss - unmasked_loss) > 1e-3 * packed_loss
    assert packed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_forward_only_is_masked_too() -> None:
    """What evaluation, probes and the final sample read."""
    recipe = tiny()
    trunk = Trunk(recipe, CPU, END)
    row_1S = torch.tensor([[5, 9, END, 7, 8, 9]])
    dense = tiny(model={"ffn": "dense"}, pool={"experts": 0})
    for made, pool_map in ((Trunk(dense, CPU, END), None), (trunk, _map(recipe))):
        pool = LocalPool(build_shard(recipe, _placement(recipe), 0, CPU)) if pool_map else PoolClient()

        def hidden(ids_1S: Tensor, made: Trunk = made, pool_map: Any = pool_map, pool: Any = pool) -> Tensor:
            ((h_1SD, _),) = pool.run([hidden_states(made, pool_map, ids_1S, 0)], (0,), 0)
            return h_1SD

        torch.testing.assert_close(hidden(row_1S)[:, 3:], hidden(row_1S[:, 3:]), rtol=1e-5, atol=1e-5)


def _placement(recipe: Recipe) -> Any:
    from pool.placement import contiguous

    return contiguous(recipe.pool.experts, 1, 1)


def _map(recipe: Recipe) -> PoolMap:
    return PoolMap(_placement(recipe).position_M, recipe.experts_per_layer, recipe.model.layers)


def test_the_mask_against_a_loop() -> None:
    tokens_BS = torch.tensor([[4, END, 6, 7, END, END, 8], [END, 2, 3, 4, 5, 6, 7]])
    mask_BSS = document_mask(tokens_BS, END)[:, 0]
    for row_S, mask_SS in zip(tokens_BS, mask_BSS, strict=True):
        for query in range(len(row_S)):
            for key in range(len(row_S)):
                between = row_S[key:query].tolist()
                assert bool(mask_SS[query, key]) == (key <= query and END not in between)


@pytest.mark.parametrize(
    "parallel", [{"pool_ranks": 1, "lanes": 2}, {"trunk_ranks": 2}], ids=["1+1-lanes", "2 trunk ranks"]
)
def test_layouts_come_to_the_same(parallel: dict[str, Any]) -> None:
    zero = {"trunk_zero": 0, "pool_zero": 0}
    one = run_training(tiny(parallel=zero, **MASKED), steps=2)
    assert_same(one, run_training(tiny(parallel={**zero, **parallel}, **MASKED), steps=2))
    assert one.scalars[0]["loss"] != run_training(tiny(parallel=zero), steps=1).scalars[0]["loss"]


def test_a_resume_with_another_mask_affects_results() -> None:
    assert affects_results("data.document_mask", tiny())
