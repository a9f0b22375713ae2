"""NormRouter, the pool-level loss and c against the paper's released implementation (tests/golden/routing.json).

Letters: L layers, T tokens, M experts, K top-k.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from router import LoadStatistics, NormRouter, balance_coefficients, norm_constant

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "routing.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["router_cases"] if case["expert_mask"] is None}
AUX = GOLDEN["pool_aux"][0]


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Largest error, relative to the largest expected value."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def router_on_logits(num_experts: int, top_k: int, sigma: float, constant: float) -> NormRouter:
    """A router whose input is its logits: the weight is the identity, so that z = h exactly."""
    router = NormRouter(num_experts, num_experts, top_k, "raw", False, constant)
    with torch.no_grad():
        router.weight_MD.copy_(torch.eye(num_experts))
        router.sigma.fill_(sigma)
    return router


@pytest.mark.parametrize("name", CASES)
def test_norm_router_case(name: str) -> None:
    case = CASES[name]
    router = router_on_logits(case["M"], case["k"], case["scale"], case["scale_initial"])
    logits_TM = torch.tensor(case["logits"], requires_grad=True)
    upstream_TM = torch.tensor(case["G"])
    probs_TM = torch.tensor(case["probs"])

    routing = router(logits_TM)
    ids_TK, scores_TK = routing.topk_expert_ids_TK, routing.topk_scores_TK
    (scores_TK * upstream_TM.gather(-1, ids_TK)).sum().backward()

    assert_close(torch.zeros_like(probs_TM).scatter(-1, ids_TK, scores_TK.detach()), probs_TM)
    # An expert of score 0 is picked by tie, which differs between devices: compare the others only.
    for ours, ours_scores, theirs, theirs_scores in zip(
        ids_TK.tolist(), scores_TK.tolist(), case["selected"], case["selected_probs"], strict=True
    ):
        positive = {i for i, s in zip(theirs, theirs_scores, strict=True) if s > 0}
        assert {i for i, s in zip(ours, ours_scores, strict=True) if s > 0} == positive
    if (scores_TK > 0).all():
        assert routing.tokens_per_expert_M.tolist() == case["tokens_per_expert"]
    else:
        assert case["edge"] == "neg"  # no other case may skip the comparison
    assert logits_TM.grad is not None and router.sigma.grad is not None
    assert_close(logits_TM.grad, case["grad_logits"])
    assert_close(router.sigma.grad, case["grad_norm_scale"])


@pytest.mark.parametrize("with_main_loss", [False, True])
def test_pool_loss(with_main_loss: bool) -> None:
    """The reference's loss of a layer is ours: coeff * M * sum_i fbar_i P_i^(l), with the factor 1/L in it."""
    num_layers, num_experts = AUX["num_layers"], AUX["M"]
    statistics = LoadStatistics("micro_batch", 1, num_layers, num_experts)
    compared = 0
    for index, micro_batch in enumerate(AUX["micro_batches"]):
        golden_layers = [micro_batch["layers"][str(layer)] for layer in range(num_layers)]
        logits = [torch.tensor(AUX["logits"][index][layer], requires_grad=True) for layer in range(num_layers)]
        routers = [
            router_on_logits(num_experts, AUX["k"], golden["norm_scale"], AUX["scale_initial"])
            for golden in golden_layers
        ]
        routings = [router(logits_TM) for router, logits_TM in zip(routers, logits, strict=True)]
        counts_LM = torch.stack([routing.tokens_per_expert_M for routing in routings])
        assert counts_LM.tolist() == [golden["tokens_per_expert"] for golden in golden_layers]
        # The reference keeps the mean count over layers.
        assert counts_LM.double().mean(0).tolist() == micro_batch["global_tokens_per_expert_after"]

        statistics.record_micro_batch(index, counts_LM)
        fractions_LM = statistics.fractions(index, step=0)
        assert (fractions_LM is None) == (index == 0)
        if fractions_LM is None:
            assert all(golden["pool_loss"] is None for golden in golden_layers)
            continue
        coeffs_LM = balance_coefficients(fractions_LM, 0.0, AUX["coeff"], groups=1)

        for layer, (golden, routing) in enumerate(zip(golden_layers, routings, strict=True)):
            pool_loss = (coeffs_LM[layer] * routing.mean_scores_M).sum()
            assert pool_loss.item() == pytest.approx(golden["pool_loss"], rel=1e-5)
            upstream_TK = torch.tensor(AUX["G"][index][layer]).gather(-1, routing.topk_expert_ids_TK)
            main_loss = (routing.topk_scores_TK * upstream_TK).sum()
            (pool_loss + main_loss if with_main_loss else pool_loss).backward()

            suffix = "" if with_main_loss else "_aux_only"
            for name, grad in (("grad_logits", logits[layer].grad), ("grad_norm_scale", routers[layer].sigma.grad)):
                assert grad is not None
                golden_full, golden_grad = torch.tensor(golden[name]), torch.tensor(golden[name + suffix])
                # The golden aux-only numbers are differences of two fp32 gradients and carry their rounding.
                atol = 1e-6 * golden_full.abs().max().item()
                torch.testing.assert_close(grad, golden_grad, rtol=1e-5, atol=atol)
                if not with_main_loss:
                    assert atol < 0.01 * golden_grad.abs().max().item()  # tight enough to see a wrong factor
            compared += 1
    assert compared == (AUX["num_micro_batches"] - 1) * num_layers


@pytest.mark.parametrize("key", [key for key, c in GOLDEN["monte_carlo_c"].items() if c != "inf"])
def test_norm_constant(key: str) -> None:
    """Two estimates with 1e5 draws each and different seeds: 5 standard errors of their difference."""
    num_experts, top_k = map(int, key.split(","))
    x = np.random.RandomState(11).randn(20_000, num_experts)
    y = np.maximum(x / np.linalg.norm(x, axis=1, keepdims=True), 0)
    terms = 1 / np.sqrt((np.sort(y, axis=1)[:, -top_k:] ** 2).sum(1))
    standard_error = np.sqrt(2) * terms[np.isfinite(terms)].std() / np.sqrt(1e5)
    assert abs(norm_constant(num_experts, top_k) - GOLDEN["monte_carlo_c"][key]) < 5 * standard_error


def test_norm_constant_is_finite_where_the_reference_is_not() -> None:
    assert GOLDEN["monte_carlo_c"]["8,1"] == "inf"
    assert 2 < norm_constant(8, 1) < 5
