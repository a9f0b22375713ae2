"""Probes, evaluation and generation move to the device what they compute with there: shown on a device with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pool.placement import contiguous
from tests.device_with_values import Mixed, device_with_values, moved
from tests.trainer.probe.tiny_models import MODELS, adapted, fresh, some_text
from tests.training import tiny
from trainer.engine.experts import build_shard
from trainer.evaluate.loss import total_loss
from trainer.model.micro_batch import PoolMap, hidden_states
from trainer.model.pool_client import LocalPool
from trainer.model.random_routing import random_routing
from trainer.model.trunk import Trunk
from trainer.probe.adapters import MoEModel
from trainer.probe.load import load
from trainer.probe.randomize import randomize
from trainer.probe.redundancy import redundancy
from trainer.probe.reuse import reuse

ROWS = some_text(5, 12)  # 120 rows for experts, more than those that are computed row by row


def probed(model: MoEModel) -> list[Any]:
    similar = redundancy(model, ROWS, 8).banks
    random = randomize(model, ROWS, model.layers[:1], draws=1)
    numbers = [cosines for bank in similar for row in bank.outputs_matrix for cosines in row]
    numbers += [random.loss, *(loss for layer in random.layers for loss in layer.losses)]
    return [numbers, load(model, ROWS).counts, reuse(model, ROWS).histogram]


def evaluated(model: MoEModel) -> list[Any]:
    nats, tokens = total_loss(model.loaded, ROWS.rows_NS1, 5, 3, end=7)
    made = model.model.generate(
        ROWS.rows_NS1[:2, :5].to(model.model.device), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    return [[nats], tokens, made.tolist()]


@pytest.mark.parametrize("measure", [probed, evaluated])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_the_cpu(name: str, measure: Callable[[MoEModel], list[Any]]) -> None:
    numbers, *counts = measure(adapted(fresh(name)))
    with device_with_values():
        found, *found_counts = measure(adapted(moved(fresh(name))))
    assert found == pytest.approx(numbers, rel=1e-5, abs=1e-6) and found_counts == counts


def held_out(kind: str, device: torch.device) -> list[float]:
    """The losses of a micro-batch as training evaluates it, with the routers' experts and with random ones."""
    balance = {} if kind == "norm" else {"pool": 0.0}
    recipe = tiny(router={"kind": kind}, balance=balance, train={"loss_chunk": 5})
    placement, m = contiguous(recipe.pool.experts, 1, 1), recipe.model
    pool_map = PoolMap(placement.position_M.to(device), recipe.experts_per_layer, m.layers)
    trunk, pool = Trunk(recipe, device, document_end=7), LocalPool(build_shard(recipe, placement, 0, device))
    sequences_BS1 = torch.randint(m.vocab, (2, m.seq_len + 1), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for reroute in (None, random_routing(1, recipe.experts_per_layer, 0, range(2))):
        ((h_BSD, _),) = pool.run([hidden_states(trunk, pool_map, sequences_BS1[:, :-1], 0, reroute)], (0,), 0)
        with torch.no_grad():
            losses.append(float(trunk.loss(h_BSD, sequences_BS1[:, 1:])))
    return losses


@pytest.mark.parametrize("kind", ["norm", "softmax", "sigmoid_bias"])
def test_evaluation_during_training(kind: str) -> None:
    expected = held_out(kind, torch.device("cpu"))
    with device_with_values() as device:
        assert held_out(kind, device) == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[1]


def test_a_tensor_that_was_not_moved_is_seen() -> None:
    model = fresh("unipool")
    with device_with_values(), pytest.raises(Mixed):
        moved(model)(ROWS.rows_NS1)
