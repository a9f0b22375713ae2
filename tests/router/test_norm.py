"""NormRouter's fast form and its hand-written backward, compared with the plain form under autograd in float64.

Letters: T tokens, M experts, K top-k.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from router import NormRouter
from router.norm import norm_route
from tests.trainer.fuzzing import fuzz

CONSTANT = 2.5


def plain_route(z_TM: Tensor, sigma: Tensor, top_k: int, normalized: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The plain way (Eq. M7, M6 and M14 of docs/method.md): all scores, the K largest, the mean."""
    s_TM = sigma * CONSTANT * (z_TM / (torch.linalg.vector_norm(z_TM, dim=-1, keepdim=True) + 1e-8)).relu()
    ids_TK = z_TM.detach().topk(top_k, dim=-1).indices
    p_TM = s_TM
    if normalized:
        sum_T1 = s_TM.sum(-1, keepdim=True)
        p_TM = s_TM / torch.where(sum_T1 == 0, 1.0, sum_T1)
    return s_TM.gather(-1, ids_TK), ids_TK, p_TM.mean(0)


def logits_with_odd_rows(tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """Rows of very different size; one in four has only zeros, only negative ones, or a single positive one."""
    z_TM = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    z_TM *= 10.0 ** torch.randint(-2, 3, (tokens, 1), generator=generator)
    z_TM[0::12] = 0.0
    z_TM[4::12] = -z_TM[4::12].abs()
    z_TM[8::12] = -z_TM[8::12].abs()
    z_TM[8::12, 0] *= -1
    return z_TM


@fuzz(150)
@given(
    tokens=st.integers(1, 26),
    num_experts=st.integers(1, 19),
    top_k=st.sampled_from([1, 2, 4]),
    normalized=st.booleans(),
    sent=st.sampled_from(["both", "gates", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_against_the_plain_form(
    tokens: int, num_experts: int, top_k: int, normalized: bool, sent: str, dtype: torch.dtype, seed: int
) -> None:
    """Values and gradients to 1e-6 of each row's scale (1e-12 in float64), whichever outputs send a gradient."""
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, num_experts)
    z_TM = logits_with_odd_rows(tokens, num_experts, generator).to(dtype).requires_grad_()
    sigma = (0.5 + torch.rand(1, generator=generator)).to(dtype).requires_grad_()
    up_TK = torch.randn(tokens, top_k, generator=generator, dtype=torch.float64)
    up_M = torch.randn(num_experts, generator=generator, dtype=torch.float64)

    def gradients(outputs: tuple[Tensor, Tensor, Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        topk_TK, _, mean_M = outputs
        pairs = {"gates": (topk_TK, up_TK.to(topk_TK.dtype)), "mean": (mean_M, up_M.to(mean_M.dtype))}
        used = [pairs[name] for name in pairs if sent in ("both", name)]
        return torch.autograd.grad([t for t, _ in used], leaves, [g for _, g in used], allow_unused=True)

    actual = norm_route(z_TM, sigma, CONSTANT, top_k, normalized)
    reference = [t.detach().double().requires_grad_() for t in (z_TM, sigma)]
    expected = plain_route(*reference, top_k, normalized)
    # Which of equal experts (score 0) is chosen, is up to the device.
    assert torch.equal(actual[1][actual[0] > 0], expected[1][expected[0] > 0])
    assert all(len(set(row)) == top_k for row in actual[1].tolist())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in ((actual[0], expected[0]), (actual[2], expected[2])):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * CONSTANT)

    (dz_TM, dsigma), (dz_expected_TM, dsigma_expected) = gradients(actual, z_TM, sigma), gradients(expected, *reference)
    assert dz_TM.dtype == dsigma.dtype == dtype
    # A row's gradient is as large as 1 / ||z|| makes it, also where its terms cancel: compare on that scale.
    norm_T1 = z_TM.detach().double().norm(dim=-1, keepdim=True).clamp(min=1e-3)
    scale = (up_TK.abs().max() + up_M.abs().max()) * CONSTANT
    torch.testing.assert_close(dz_TM * norm_T1 / scale, dz_expected_TM * norm_T1 / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        dsigma / scale / tokens, dsigma_expected / scale / tokens, rtol=0, atol=tolerance, check_dtype=False
    )
    assert (dz_TM[(z_TM <= 0).all(-1)] == 0).all()


@pytest.mark.parametrize("normalized", [False, True])
def test_gradients_against_differences(normalized: bool) -> None:
    """float64, numerical: independent of autograd's own formulas too."""
    generator = torch.Generator().manual_seed(3)
    z_TM = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, s: norm_route(z, s, CONSTANT, 2, normalized)[::2], (z_TM, sigma), check_undefined_grad=True
    )


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-12, 1e12])
def test_tiny_and_huge_rows_stay_finite(normalized: bool, size: float) -> None:
    z_TM = (size * torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, 0.0]])).requires_grad_()
    sigma = torch.ones(1, requires_grad=True)
    topk_TK, _, mean_M = norm_route(z_TM, sigma, CONSTANT, 2, normalized)
    (topk_TK.sum() + mean_M @ torch.tensor([1.0, 2.0, -5.0])).backward()
    for tensor in (topk_TK, mean_M, z_TM.grad, sigma.grad):
        assert tensor is not None and tensor.isfinite().all()


def saved_shapes(router: NormRouter, h_TD: Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing = router(h_TD)
    assert routing.topk_scores_TK.shape == (13, 2)
    return shapes


def test_what_is_kept_for_the_backward() -> None:
    """One (T, M) matrix, the logits; nothing without gradients."""
    router = NormRouter(7, 11, 2, "raw", False, CONSTANT)
    router.reset_parameters(0.7, torch.Generator().manual_seed(5))
    h_TD = torch.randn(13, 7, generator=torch.Generator().manual_seed(6))
    assert saved_shapes(router, h_TD).count((13, 11)) == 1
    with torch.no_grad():
        assert saved_shapes(router, h_TD) == []


def test_backward_twice_gives_the_same_and_leaves_the_logits() -> None:
    """The backward works in place on a buffer of its own, never on what was saved."""
    z_TM = torch.randn(6, 5, generator=torch.Generator().manual_seed(7), requires_grad=True)
    before_TM = z_TM.detach().clone()
    topk_TK, _, mean_M = norm_route(z_TM, torch.ones(1), CONSTANT, 2, True)
    up_M = torch.arange(5.0)
    outputs = topk_TK.sum() + mean_M @ up_M
    first, second = (torch.autograd.grad(outputs, z_TM, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(z_TM, before_TM) and (first != 0).any()
