"""NormRouter while the lock is annealed and when it is closed, compared with all scores under autograd in float64.

Letters: T tokens, M experts, K top-k, E experts that the layer owns.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from router import Faded, NormRouter, Reach, SoftmaxRouter, entropy_loss, owned
from router.norm import norm_route
from tests.router.test_norm import CONSTANT, logits_with_odd_rows, saved_shapes
from tests.trainer.fuzzing import fuzz


def plain_route(
    z_TM: Tensor, sigma: Tensor, top_k: int, normalized: bool, own: list[int], alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain way (Eq. M36, M37 and M14 of docs/method.md): all scores, a loop over the tokens, the mean."""
    factor_M = torch.full((z_TM.shape[1],), 1 - alpha, dtype=z_TM.dtype)
    factor_M[own] = 1.0
    s_TM = factor_M * sigma * CONSTANT * (z_TM / (torch.linalg.vector_norm(z_TM, dim=-1, keepdim=True) + 1e-8)).relu()
    chosen = []
    for z_M in z_TM.tolist():
        q = {i: z if z <= 0 else z * float(factor_M[i]) for i, z in enumerate(z_M) if alpha < 1 or i in own}
        chosen.append(sorted(q, key=lambda i: -q[i])[:top_k])
    ids_TK = torch.tensor(chosen)
    p_TM = s_TM
    if normalized:
        sum_T1 = s_TM.sum(-1, keepdim=True)
        p_TM = s_TM / torch.where(sum_T1 == 0, 1.0, sum_T1)
    return s_TM.gather(-1, ids_TK), ids_TK, p_TM.mean(0)


def reach_of(own: list[int], num_experts: int, alpha: float, dtype: torch.dtype = torch.float64) -> Reach:
    if alpha == 1:
        return owned(torch.tensor(own), num_experts)
    factor_M = torch.full((num_experts,), 1 - alpha, dtype=dtype)
    factor_M[own] = 1.0
    return Faded(factor_M)


@fuzz(150)
@given(
    tokens=st.integers(1, 26),
    share=st.sampled_from([(2, 4), (3, 3), (4, 2), (4, 5), (1, 6)]),
    alpha=st.sampled_from([0.0, 0.25, 0.7, 1 - 1e-9, 1.0]),
    top_k=st.sampled_from([1, 2]),
    normalized=st.booleans(),
    sent=st.sampled_from(["both", "gates", "mean"]),
    seed=st.integers(0, 2**20),
)
def test_against_the_plain_form(
    tokens: int, share: tuple[int, int], alpha: float, top_k: int, normalized: bool, sent: str, seed: int
) -> None:
    """Values and gradients to 1e-12 of each row's scale, also of rows without a positive logit."""
    layers, own_experts = share
    num_experts = layers * own_experts
    generator = torch.Generator().manual_seed(seed)
    own = sorted(torch.randperm(num_experts, generator=generator)[:own_experts].tolist())
    z_TM = logits_with_odd_rows(tokens, num_experts, generator).requires_grad_()
    sigma = (0.5 + torch.rand(1, generator=generator)).double().requires_grad_()
    up_TK = torch.randn(tokens, top_k, generator=generator, dtype=torch.float64)
    up_M = torch.randn(num_experts, generator=generator, dtype=torch.float64)

    def gradients(outputs: tuple[Tensor, Tensor, Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        pairs = {"gates": (outputs[0], up_TK), "mean": (outputs[2], up_M)}
        used = [pairs[name] for name in pairs if sent in ("both", name)]
        return torch.autograd.grad([t for t, _ in used], leaves, [g for _, g in used], allow_unused=True)

    actual = norm_route(z_TM, sigma, CONSTANT, top_k, normalized, reach_of(own, num_experts, alpha))
    reference = [t.detach().clone().requires_grad_() for t in (z_TM, sigma)]
    expected = plain_route(*reference, top_k, normalized, own, alpha)
    distinct_T = (z_TM != 0).any(-1)  # which of equal preferences wins is up to the device
    assert torch.equal(actual[1][distinct_T], expected[1][distinct_T])
    if alpha == 1:
        assert set(actual[1].flatten().tolist()) <= set(own)
    for ours, theirs in ((actual[0], expected[0]), (actual[2], expected[2])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * CONSTANT)

    (dz_TM, dsigma), (dz_expected_TM, dsigma_expected) = gradients(actual, z_TM, sigma), gradients(expected, *reference)
    norm_T1 = z_TM.detach().norm(dim=-1, keepdim=True).clamp(min=1e-3)
    scale = (up_TK.abs().max() + up_M.abs().max()) * CONSTANT
    torch.testing.assert_close(dz_TM * norm_T1 / scale, dz_expected_TM * norm_T1 / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(dsigma / scale / tokens, dsigma_expected / scale / tokens, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ramp_begins_as_the_full_pool_and_ends_as_the_lock(dtype: torch.dtype) -> None:
    """The beginning to the bit. At the end a foreign expert may still win a token without a positive own logit."""
    generator = torch.Generator().manual_seed(4)
    z_TM, sigma = torch.randn(200, 12, generator=generator, dtype=dtype), torch.tensor([1.2], dtype=dtype)
    own = [1, 4, 7, 11]
    whole = norm_route(z_TM, sigma, CONSTANT, 2, False)
    start = norm_route(z_TM, sigma, CONSTANT, 2, False, Faded(torch.ones(12)))
    assert all(torch.equal(a, b) for a, b in zip(whole, start, strict=True))
    factor_M = torch.zeros(12)
    factor_M[own] = 1.0
    end = norm_route(z_TM, sigma, CONSTANT, 2, False, Faded(factor_M))
    locked = norm_route(z_TM, sigma, CONSTANT, 2, False, owned(torch.tensor(own), 12))
    torch.testing.assert_close(end[0], locked[0])
    torch.testing.assert_close(end[2], locked[2])
    assert torch.equal(end[1][end[0] > 0], locked[1][locked[0] > 0])
    assert not torch.equal(end[1], locked[1]) and not torch.equal(whole[1], locked[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_token_stays_within_the_layer(bad: float) -> None:
    """Its gate values are NaN, and it is counted on the layer's own experts."""
    router = NormRouter(3, 8, 2, "raw", False, CONSTANT)
    router.reset_parameters(1.0, torch.Generator().manual_seed(1))
    h_TD = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    h_TD[2, 1] = bad
    routing = router(h_TD, owned(torch.tensor([2, 5, 6, 7]), 8))
    assert routing.topk_scores_TK.isnan().all(-1).tolist() == [False, False, True, False, False]
    assert routing.topk_expert_ids_TK[2].tolist() == [2, 5]
    assert routing.tokens_per_expert_M.sum() == 10 and routing.tokens_per_expert_M[[0, 1, 3, 4]].sum() == 0
    assert routing.mean_scores_M.shape == (8,)


def test_what_is_kept_for_the_backward_and_who_has_no_lock() -> None:
    router = NormRouter(7, 12, 2, "raw", False, CONSTANT)
    router.reset_parameters(0.7, torch.Generator().manual_seed(5))
    h_TD = torch.randn(13, 7, generator=torch.Generator().manual_seed(6))
    for alpha in (0.3, 1.0):
        reach = reach_of([0, 3, 4], 12, alpha, torch.float32)
        shapes = saved_shapes(lambda h_TD, reach=reach: router(h_TD, reach), h_TD)
        assert shapes.count((13, 12)) == 1 and shapes.count((13, 3)) == 0
    with pytest.raises(NotImplementedError, match="SoftmaxRouter has no locked form"):
        SoftmaxRouter(7, 12, 2, "raw", False)(h_TD, reach)


@pytest.mark.parametrize("unused", [0, 3])
def test_entropy_loss_against_autograd(unused: int) -> None:
    """Also where a layer does not use some experts at all, as when it is locked."""
    generator = torch.Generator().manual_seed(8)
    p_LM = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    p_LM[1:, :unused] = 0.0
    p_LM.requires_grad_()
    loss, gradient_LM = entropy_loss(p_LM.detach(), 0.7, math.log(3))
    expected = torch.zeros((), dtype=torch.float64)
    for p_M in p_LM:
        share_M = p_M / (p_M.sum() + 1e-8)
        entropy = -(share_M * torch.log(share_M + 1e-8)).sum()
        expected = expected + 0.7 * (entropy - math.log(3)) ** 2 / 4
    (expected_LM,) = torch.autograd.grad(expected, p_LM)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_LM, expected_LM, rtol=1e-10, atol=1e-12)
    assert loss > 0 and gradient_LM.isfinite().all()


def test_entropy_loss_is_0_where_each_layer_uses_as_many_experts_as_it_will_own() -> None:
    p_LM = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.2, 0.0, 0.2]])
    loss, gradient_LM = entropy_loss(p_LM, 1.0, math.log(2))
    assert loss < 1e-12 and gradient_LM.abs().max() < 1e-4
    assert entropy_loss(torch.ones(2, 4), 1.0, math.log(2))[0] > 0.1
