"""Probes of a model whose layers own their experts: as many experts as a layer owns, and no more, take part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainer.probe.tiny_models import adapted, fresh, some_text
from trainer.common.errors import UserError
from trainer.probe.adapters import Choice, MoELayer, MoEModel, observed
from trainer.probe.load import load
from trainer.probe.randomize import candidates, randomised, randomize, usual_overs
from trainer.probe.redundancy import redundancy
from trainer.probe.reuse import reuse
from trainer.probe.text import mean_loss

OWNERS = [1, 0, 2, 0, 1, 2]


def model_with(factor: float = 0.0, owners: list[int] | None = OWNERS) -> MoEModel:
    """3 layers, 6 experts, top-1; with a factor the lock is still being annealed."""
    return adapted(
        fresh("unipool", num_experts_per_tok=1, expert_owners=owners, foreign_expert_factor=factor), "locked"
    )


def test_random_experts_are_a_layers_own_or_the_pools() -> None:
    model, text, none = model_with(), some_text(), torch.zeros(6, dtype=torch.int64)
    assert model.owners == tuple(OWNERS)
    assert [candidates(model, layer, "layer", 8, none).tolist() for layer in model.layers] == [[1, 3], [0, 4], [2, 5]]
    assert candidates(model, model.layers[1], "pool", 8, none).tolist() == list(range(6))
    assert usual_overs(model, 8) == ("layer", "pool")
    with pytest.raises(UserError, match="--matched 8: must be at most 2, the experts that a layer owns"):
        randomize(model, text, model.layers, ["matched"])
    seen: set[int] = set()

    def see(layer: MoELayer, choice: Choice) -> None:
        if layer.number == 1:
            seen.update(choice.topk_expert_ids_TK.flatten().tolist())

    found = randomize(model, text, model.layers[1:2], draws=1)
    assert [(r.over, r.experts) for r in found.layers] == [("layer", 2), ("pool", 6)]
    own_C = candidates(model, model.layers[1], "layer", 8, none)
    with randomised(model.layers[1], own_C, torch.Generator().manual_seed(0)), observed(model, see):
        mean_loss(model, text)
    assert seen == {0, 4}


@pytest.mark.parametrize(("factor", "owners"), [(0.3, OWNERS), (0.0, None)], ids=["annealed", "open"])
def test_before_the_lock_layers_share_the_pool(factor: float, owners: list[int] | None) -> None:
    model, text = model_with(factor, owners), some_text()
    assert model.owners is None and usual_overs(model, 3) == ("pool", "matched")
    assert not reuse(model, text).layer_private and load(model, text).owners is None
    assert redundancy(model, text, sampled=4).owners is None


def test_every_choice_of_a_locked_model_is_another_expert() -> None:
    found = reuse(model_with(), some_text())
    assert found.distinct == found.uniform == 3 and found.of_choices == 1 and found.layer_private
    assert "uses 1 of 2 experts per token" in found.notes()[0]


def test_load_counts_a_layers_own_experts() -> None:
    found = load(model_with(), some_text())
    foreign = [
        n for layer, row in enumerate(found.counts) for n, owner in zip(row, OWNERS, strict=True) if owner != layer
    ]
    assert not any(foreign) and [u.experts for u in found.usage] == [2, 2, 2] and found.pool.experts == 6
    for layer, usage in enumerate(found.usage):
        own = [n for n, owner in zip(found.counts[layer], OWNERS, strict=True) if owner == layer]
        assert usage.imbalance == pytest.approx(max(own) / (sum(own) / 2)) and usage.unused == own.count(0)
    assert found.specialisation == pytest.approx(1) and found.owners == tuple(OWNERS)
    assert "no two layers share experts" in found.notes()[2] and len(found.draw().axes[0].collections) == 1


def test_redundancy_tells_pairs_of_one_layer_from_others() -> None:
    found = redundancy(model_with(), some_text(), sampled=4)
    outputs_EE = np.array(found.banks[0].outputs_matrix)
    same = np.mean([outputs_EE[1, 3], outputs_EE[0, 4], outputs_EE[2, 5]])
    others = np.mean([outputs_EE[a, b] for a in range(6) for b in range(a) if OWNERS[a] != OWNERS[b]])
    assert f"of one layer {same:z.3f} (outputs)" in found.notes()[-1]
    assert f"of different layers {others:z.3f} (outputs)" in found.notes()[-1]
