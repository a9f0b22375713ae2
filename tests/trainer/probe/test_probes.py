"""The numbers of all probes, compared with cases counted by hand and with slow references."""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from router import layer_divergence
from tests.trainer.probe.tiny_models import MODELS, adapted, built, expert_by_hand, fresh, some_text, tiny
from trainer.common.errors import UserError
from trainer.probe.adapters import Choice, MoELayer, MoEModel, rerouted
from trainer.probe.load import coverage, load
from trainer.probe.randomize import Over, candidates, pick_layers, randomised, randomize, usual_overs
from trainer.probe.redundancy import output_cosine, redundancy, weight_cosine
from trainer.probe.reuse import reuse
from trainer.probe.text import mean_loss, read


@pytest.mark.parametrize("name", ["unipool", "deepseek_v3"])
def test_the_loss_is_that_of_every_token(name: str) -> None:
    text = some_text(rows=3)
    with torch.no_grad():
        log_p = built(name)(text.rows_NS1[:, :-1]).logits.double().log_softmax(-1)
    by_hand = [
        -float(log_p[row, place, token])
        for row, tokens in enumerate(text.rows_NS1[:, 1:].tolist())
        for place, token in enumerate(tokens)
    ]
    assert text.tokens == len(by_hand)
    assert mean_loss(tiny(name), text) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def same_experts(name: str) -> MoEModel:
    """Return a model in which all experts of a bank are the same."""
    model = fresh(name)
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.gate_up_proj.data[:] = module.gate_up_proj.data[:1].clone()
            module.down_proj.data[:] = module.down_proj.data[:1].clone()
    return adapted(model, name)


@pytest.mark.parametrize("name", MODELS)
def test_random_routing_matters_only_among_different_experts(name: str) -> None:
    text = some_text()
    same, different = (
        randomize(model, text, model.layers, matched=3, draws=2) for model in (same_experts(name), tiny(name))
    )
    assert same.loss == pytest.approx(mean_loss(same_experts(name), text), abs=1e-6)
    assert all(loss == pytest.approx(same.loss, abs=5e-6) for r in same.layers for loss in r.losses)
    assert all(abs(loss - different.loss) > 2e-5 for r in different.layers for loss in r.losses)
    assert all(r.spread > 2e-5 for r in different.layers)


def test_means_and_spreads() -> None:
    """Means and spreads over the draws, by layer and over layers; a layer does not depend on the others."""
    model, text = tiny("unipool"), some_text()
    found = randomize(model, text, model.layers[1:], ["pool"], draws=3, seed=5)
    losses = np.array([r.losses for r in found.layers])
    assert losses.shape == (2, 3) and [r.layer for r in found.layers] == [1, 2]
    for r, own in zip(found.layers, losses, strict=True):
        assert (r.increase, r.spread) == pytest.approx((own.mean() - found.loss, own.std(ddof=1)))
    (mean,) = found.means
    by_draw = losses.mean(0)
    assert (mean.increase, mean.spread) == pytest.approx((by_draw.mean() - found.loss, by_draw.std(ddof=1)))
    alone = randomize(model, text, model.layers[2:], ["pool"], draws=3, seed=5)
    assert alone.layers == found.layers[1:]
    assert randomize(model, text, model.layers[2:], ["pool"], draws=3, seed=6).layers != alone.layers
    assert randomize(model, text, model.layers[2:], ["pool"], draws=1, seed=5).layers[0].spread is None


def test_draws_are_uniform_and_without_repetition() -> None:
    """Exactly the candidates are drawn, K distinct ones per token, and gate values remain."""
    model, text, seen = tiny("unipool"), some_text(rows=200), []
    candidates_C = torch.tensor([1, 4, 5])

    def see(layer: MoELayer, choice: Choice) -> None:
        if layer.number == 0:
            seen.append(choice)

    with randomised(model.layers[0], candidates_C, torch.Generator().manual_seed(0)):
        read(model, text, see)
    ids_TK = torch.cat([choice.topk_expert_ids_TK for choice in seen])
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())
    counts = torch.bincount(ids_TK.flatten(), minlength=6)
    assert counts[[0, 2, 3]].sum() == 0
    expected = 2 * text.tokens / 3
    assert float((counts[candidates_C] - expected).abs().max()) < 5 * math.sqrt(expected)


def test_candidates_of_each_protocol() -> None:
    counts_E = torch.tensor([3, 7])
    model = tiny("sub-pools")
    layer = model.layers[1]
    assert candidates(model, layer, "layer", 1, counts_E).tolist() == [2, 3]
    assert candidates(model, layer, "pool", 1, counts_E).tolist() == [0, 1, 2, 3, 4, 5]
    assert candidates(model, layer, "matched", 1, counts_E).tolist() == [3]
    overs: dict[str, tuple[Over, ...]] = {
        "unipool": ("pool", "matched"),
        "sub-pools": ("layer",),
        "qwen2_moe": ("layer", "matched"),
        "mixtral": ("layer", "matched"),
    }
    for name, expected in overs.items():
        assert usual_overs(tiny(name), 3) == expected, name
    assert usual_overs(tiny("unipool"), 6) == usual_overs(tiny("unipool"), 2) == ("pool",)


def test_matched_draws_from_the_most_used() -> None:
    """The most used experts are those of the learned routing on the text."""
    model, text = tiny("qwen2_moe"), some_text()
    counts = load(model, text).counts[1]
    most = candidates(model, model.layers[1], "matched", 3, torch.tensor(counts))
    assert {int(e) - 6 for e in most} == set(sorted(range(6), key=lambda e: -counts[e])[:3])
    found = randomize(model, text, model.layers[1:2], ["matched"], matched=3, draws=1, seed=2)
    state = np.random.SeedSequence([2, 0, 1, 2]).generate_state(1)
    with randomised(model.layers[1], most, torch.Generator().manual_seed(int(state[0]))):
        assert found.layers[0].losses == (mean_loss(model, text),)
    assert found.layers[0].experts == 3


def test_layers_are_picked_by_number() -> None:
    model = tiny("deepseek_v2")
    numbers = {
        wanted: [layer.number for layer in pick_layers(model, wanted)] for wanted in ("deep", "all", "2,1", "1-2")
    }
    assert numbers == {"deep": [2], "all": [1, 2], "2,1": [1, 2], "1-2": [1, 2]}
    for wrong, line in {
        "0-2": "layer 0 has no router",
        "7": "layer 7",
        "x": "must be deep",
        "2-1": "no such layer",
    }.items():
        with pytest.raises(UserError, match=line):
            pick_layers(model, wrong)


def test_impossible_protocols_are_refused() -> None:
    model, text = tiny("olmoe"), some_text()
    with pytest.raises(UserError, match="--over pool: each layer of this model has its own experts"):
        randomize(model, text, model.layers, ["pool"])
    with pytest.raises(UserError, match="--matched 1: must be at least 2"):
        randomize(model, text, model.layers, ["matched"], matched=1)


def forced(model: MoEModel, by_layer: list[list[list[int]]]) -> ExitStack:
    """Reroute token t of a forward pass to the global ids by_layer[l][t % len] in layer l."""
    stack = ExitStack()
    for layer, wanted in zip(model.layers, by_layer, strict=True):
        table = torch.tensor(wanted)
        stack.enter_context(
            rerouted(layer, lambda ids_TK, table=table: table[torch.arange(len(ids_TK)) % len(table)])  # type: ignore[misc]
        )
    return stack


def test_reuse_of_a_forced_routing() -> None:
    """One token meets experts 0 and 1 three times, the other one meets 0 to 5 once: 2 and 6 of 6 choices."""
    model, text = tiny("unipool"), some_text(rows=4, length=12)
    with forced(model, [[[0, 1], [0, 1]], [[1, 0], [2, 3]], [[0, 1], [5, 4]]]):
        found = reuse(model, text)
    assert found.histogram == (0, 0, 24, 0, 0, 0, 24) and found.tokens == 48
    assert (found.distinct, found.spread) == (4, 2)
    assert (found.of_layers, found.of_choices) == pytest.approx((4 / 3, 4 / 6))
    assert found.uniform == pytest.approx(6 * (1 - (4 / 6) ** 3)) and not found.layer_private


def test_reuse_by_sets() -> None:
    """The count agrees with a set per token, and layers with their own experts never share one."""
    model, text = tiny("unipool"), some_text()
    met: list[set[int]] = [set() for _ in range(text.tokens)]

    def see(_layer: MoELayer, choice: Choice) -> None:
        for token, ids in enumerate(choice.topk_expert_ids_TK.tolist()):
            met[token] |= set(ids)

    read(model, text, see)
    found = reuse(model, text)
    assert found.distinct == pytest.approx(sum(map(len, met)) / len(met))
    assert found.histogram == tuple(sum(len(m) == n for m in met) for n in range(7))
    own = reuse(tiny("deepseek_v3"), text)
    assert own.layer_private and own.distinct == own.uniform == 4 and own.of_choices == 1


def test_load_of_a_forced_routing() -> None:
    """Three layers choose two of six experts: always 0, 1; alternately 2, 3 and 4, 5; alternately 0, 1 and 2, 3."""
    model, text = tiny("unipool"), some_text(rows=4, length=12)
    with forced(model, [[[0, 1]], [[2, 3], [4, 5]], [[0, 1], [2, 3]]]):
        found = load(model, text)
    assert found.counts == ((48, 48, 0, 0, 0, 0), (0, 0, 24, 24, 24, 24), (24, 24, 24, 24, 0, 0))
    assert [u.effective for u in found.usage] == pytest.approx([2, 4, 4])
    assert [(u.imbalance, u.unused) for u in found.usage] == [(3, 4), (1.5, 2), (1.5, 2)]
    shares = np.array([72, 72, 48, 48, 24, 24]) / 288
    assert found.pool.effective == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert (found.pool.imbalance, found.pool.unused) == pytest.approx((1.5, 0))
    a, b, c = found.divergence
    mixed = [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    near = -sum(p * math.log2(p) for p in mixed) - (1 + 2) / 2
    assert (a, b, c) == (
        pytest.approx([0, 1, near]),
        pytest.approx([1, 0, 0.5]),
        pytest.approx([near, 0.5, 0]),
    )
    assert found.specialisation == found.shared_specialisation == pytest.approx((1 + near + 0.5) / 3)
    (row,) = [r for r in found.rows() if (r["layer"], r["expert"]) == (1, 4)]
    assert (row["assignments"], row["share"]) == (24, 0.25)


def test_union_of_the_most_used() -> None:
    counts_LM = torch.tensor([[5, 3, 0, 0, 2], [4, 0, 6, 0, 0], [0, 0, 0, 0, 10]])
    one, two, four = (coverage(counts_LM, top) for top in (1, 2, 4))
    assert (one.union, one.of_pool, one.share) == pytest.approx((3, 0.6, (0.5 + 0.6 + 1) / 3))
    assert (two.union, two.share) == pytest.approx((4, (0.8 + 1 + 1) / 3))
    assert (four.union, four.share) == pytest.approx((4, 1))  # expert 3 is never used


def test_layers_of_sub_pools_differ_from_those_of_others() -> None:
    bits_LL = layer_divergence(torch.tensor([[1, 1, 0], [2, 2, 0], [0, 0, 9]])).numpy()
    assert bits_LL == pytest.approx(np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0]]))
    found = load(tiny("sub-pools"), some_text())
    assert found.specialisation == pytest.approx(1) and found.shared_specialisation is None
    assert [len(counts) for counts in found.counts] == [2, 2, 2] and found.pool.experts == 6
    assert [r["expert"] for r in found.rows()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["unipool", "qwen2_moe"])
@torch.no_grad()
def test_cosines_by_pairs(name: str) -> None:
    """Cosines of an expert with a copy, with one whose hidden units are permuted, and with its negative."""
    model = fresh(name)
    experts = model.model.experts if name == "unipool" else model.model.layers[1].mlp.experts
    w1, w3 = ([w.chunk(2)[half] for w in experts.gate_up_proj] for half in (0, 1))
    w2 = list(experts.down_proj)
    order = torch.randperm(len(w1[0]), generator=torch.Generator().manual_seed(0))
    for to, rows, sign in ((1, torch.arange(len(order)), 1), (2, order, 1), (3, torch.arange(len(order)), -1)):
        w1[to].copy_(w1[0][rows])
        w3[to].copy_(w3[0][rows])
        w2[to].copy_(sign * w2[0][:, rows])
    bank = adapted(model, name).layers[1].bank
    x_TD = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    weights_EE, outputs_EE = weight_cosine(bank), output_cosine(bank, [x_TD[:3], x_TD[3:]])
    flat = [torch.cat([m.flatten() for m in matrices]).double() for matrices in zip(w1, w3, w2, strict=True)]
    made = [torch.stack([expert_by_hand(model, 1, expert, x_D) for x_D in x_TD]) for expert in range(6)]
    for i in range(6):
        for j in range(6):
            assert weights_EE[i, j] == pytest.approx(float(F.cosine_similarity(flat[i], flat[j], dim=0)), abs=1e-5)
            by_token = F.cosine_similarity(made[i], made[j], dim=1)
            assert outputs_EE[i, j] == pytest.approx(float(by_token.mean()), abs=1e-5)
    assert weights_EE[0, 1] == pytest.approx(1) and weights_EE[0, 2] < 0.9
    assert outputs_EE[0, [1, 2, 3]] == pytest.approx([1, 1, -1], abs=1e-5)


def test_weights_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = tiny("unipool").banks[0]
    whole = weight_cosine(bank)
    monkeypatch.setattr("trainer.probe.redundancy._NUMBERS", 6 * 3 * 16 * 5)  # 5 of 12 hidden units at a time
    assert weight_cosine(bank) == pytest.approx(whole, abs=1e-6)


def test_redundancy_of_banks() -> None:
    """Each layer's experts are compared on its own inputs, at the same positions, which the seed selects."""
    model, text = tiny("deepseek_v2"), some_text()
    found = redundancy(model, text, sampled=9, seed=1)
    assert found.sampled == 9 and [bank.layers for bank in found.banks] == [(1,), (2,)]
    seen: dict[int, Tensor] = {}
    read(model, text, lambda layer, choice: seen.update({layer.number: choice.x_TD}))
    places = torch.randperm(text.tokens, generator=torch.Generator().manual_seed(1))[:9]
    for bank, layer in zip(found.banks, model.layers, strict=True):
        expected = output_cosine(layer.bank, [seen[layer.number][places]])
        assert np.array(bank.outputs_matrix) == pytest.approx(expected, abs=1e-5)
        pairs = expected[np.triu_indices(8, 1)]
        assert bank.outputs.mean == pytest.approx(pairs.mean(), abs=1e-5)
        assert bank.outputs.largest == pytest.approx(pairs.max(), abs=1e-5) == bank.alike[0].outputs
    assert found.banks[1].alike[0].first >= 8
    assert len(found.rows()) == 2 * 28
    assert redundancy(model, text, sampled=9, seed=2).banks[0].outputs != found.banks[0].outputs
