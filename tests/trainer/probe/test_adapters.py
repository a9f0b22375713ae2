"""Observed and replaced choices in models of every family, compared with loops over tokens and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainer.probe.tiny_models import (
    FAMILIES,
    MODELS,
    adapted,
    built,
    expert_by_hand,
    fresh,
    gates,
    some_text,
    tiny,
)
from trainer.common.errors import UserError
from trainer.probe.adapters import Choice, MoELayer, observed, rerouted

ROUTING_LAYERS = {"qwen3_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2]}
"""The layers with a router in models where some layers have one FFN."""


def inputs() -> Tensor:
    return some_text().rows_NS1[:2, :-1]


class Spy:
    """Records the inputs and outputs of each layer's experts in a forward pass, without shared experts."""

    def __init__(self, name: str):
        self.choices: dict[int, Choice] = {}
        self.outputs: list[Tensor] = []
        self._model = tiny(name)
        with observed(self._model, self._see), torch.no_grad():
            modules = {id(layer.bank.module): layer.bank.module for layer in self._model.layers}
            hooks = [module.register_forward_hook(self._keep) for module in modules.values()]
            self.logits = self._model.model(inputs()).logits
            for hook in hooks:
                hook.remove()

    def _see(self, layer: MoELayer, choice: Choice) -> None:
        self.choices[layer.number] = choice

    def _keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self.outputs.append(output)


def by_hand(name: str, layer: MoELayer, choice: Choice, ids_TK: Tensor) -> Tensor:
    """Return sum_k gate_k * e_k(x), computed for one token and choice at a time from global ids."""
    offset = 0 if name in ("unipool", "sub-pools") else layer.bank.first
    rows = []
    for x_D, gates_K, ids_K in zip(choice.x_TD, choice.topk_scores_TK, ids_TK.tolist(), strict=True):
        made = (expert_by_hand(built(name), layer.number, e - offset, x_D) for e in ids_K)
        rows.append(sum(g * y for g, y in zip(gates_K.double(), made, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_observed_choices_explain_the_output(name: str) -> None:
    """Ids, gate values and inputs determine the experts' output, and experts of different layers have different ids."""
    model, spy = tiny(name), Spy(name)
    assert [layer.number for layer in model.layers] == ROUTING_LAYERS.get(name, [0, 1, 2]) == list(spy.choices)
    assert model.top_k == 2
    assert (len(model.banks), model.any_expert) == {
        "unipool": (1, True),
        "sub-pools": (3, True),
    }.get(name, (len(model.layers), False))
    for layer, output_TD in zip(model.layers, spy.outputs, strict=True):
        choice = spy.choices[layer.number]
        assert set(choice.topk_expert_ids_TK.flatten().tolist()) <= set(
            range(layer.bank.first, layer.bank.first + layer.bank.experts)
        )
        expected_TD = by_hand(name, layer, choice, choice.topk_expert_ids_TK)
        torch.testing.assert_close(output_TD.double(), expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_routers_choose_as_in_their_papers(name: str) -> None:
    """Softmax or sigmoid, normalisation, groups, bias and scaling agree, token by token, with the family's paper."""
    model, spy = tiny(name), Spy(name)
    for layer in model.layers:
        choice = spy.choices[layer.number]
        for x_D, gates_K, ids_K in zip(
            choice.x_TD, choice.topk_scores_TK.tolist(), choice.topk_expert_ids_TK.tolist(), strict=True
        ):
            seen = {e - layer.bank.first: g for e, g in zip(ids_K, gates_K, strict=True)}
            assert seen == pytest.approx(gates(name, layer.router, x_D), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_forced_routing_is_a_loop_over_the_forced_experts(name: str) -> None:
    """Gate values remain the learned ones, other layers are not rerouted, and nothing is afterwards."""
    model, learned = tiny(name), Spy(name)
    layer = model.layers[1]
    reach = range(model.experts) if model.any_expert else range(layer.bank.first, layer.bank.first + layer.bank.experts)
    forced_TK = torch.tensor([[reach[(5 * t) % len(reach)], reach[(5 * t + 1) % len(reach)]] for t in range(24)])
    with rerouted(layer, lambda ids_TK: forced_TK):
        spy = Spy(name)
    seen = spy.choices[layer.number]
    assert seen.topk_expert_ids_TK.equal(forced_TK)
    assert seen.topk_scores_TK.equal(learned.choices[layer.number].topk_scores_TK)
    expected_TD = by_hand(name, layer, seen, forced_TK)
    torch.testing.assert_close(spy.outputs[1].double(), expected_TD, rtol=1e-4, atol=1e-4)
    assert spy.outputs[0].equal(learned.outputs[0]) and not spy.logits.allclose(learned.logits)
    assert Spy(name).logits.equal(learned.logits)


@pytest.mark.parametrize("name", ["unipool", "sub-pools", "qwen2_moe"])
@torch.no_grad()
def test_a_single_expert(name: str) -> None:
    """`Bank.run` returns the output of each expert without gate values."""
    x_TD = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    for layer in tiny(name).layers:
        shared = name != "qwen2_moe"
        for expert in range(layer.bank.experts):
            number = expert + (layer.bank.first if shared else 0)
            expected = torch.stack([expert_by_hand(built(name), layer.number, number, x_D) for x_D in x_TD])
            torch.testing.assert_close(layer.bank.run(expert, x_TD).double(), expected, rtol=1e-4, atol=1e-4)


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(UserError, match="is a dense model"):
        adapted(fresh("unipool", ffn="dense"))
    with pytest.raises(UserError, match="x: models of type llama are not supported"):
        adapted(LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
