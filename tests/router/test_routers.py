"""Routers against a loop over tokens in float64, on odd sizes and at the edges.

Letters: T tokens, D hidden, M experts, K top-k.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from router import Router, Routing, build_router, load_imbalance, select_experts
from router.norm import norm_route

KINDS = ["norm", "softmax", "sigmoid_bias", "norm_bias"]
T, D, M = 13, 7, 11
CONSTANT = 2.5


def make_router(kind: str, top_k: int, scores: str = "raw", num_experts: int = M) -> Router:
    router = build_router(kind, D, num_experts, top_k, scores, True, CONSTANT)
    router.reset_parameters(0.7, torch.Generator().manual_seed(5))
    with torch.no_grad():
        if kind.startswith("norm"):
            router.sigma.fill_(1.3)
        if kind.endswith("bias"):
            router.expert_bias_M.copy_(torch.randn(num_experts, generator=torch.Generator().manual_seed(6)))
    return router


def hidden_states(seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def loop_scores(kind: str, z: list[Tensor], sigma: Tensor) -> list[Tensor]:
    """The scores of one token; z holds a float64 scalar per expert."""
    if kind.startswith("norm"):
        norm = torch.sqrt(sum(v * v for v in z)) + 1e-8
        return [sigma * CONSTANT * (v / norm if v > 0 else 0 * v) for v in z]
    if kind == "softmax":
        total = sum(torch.exp(v) for v in z)
        return [torch.exp(v) / total for v in z]
    return [1 / (1 + torch.exp(-v)) for v in z]


def loop_routing(
    kind: str, router: Router, h: Tensor, weight: Tensor, sigma: Tensor
) -> tuple[list[list[int]], list[list[Tensor]], list[Tensor], Tensor]:
    """(ids, gate values, P, z-loss), token by token. Experts of score 0 come last, by their logit."""
    bias = router.expert_bias_M.double() if kind.endswith("bias") else torch.zeros(M, dtype=torch.float64)
    all_ids, all_gates = [], []
    mean_scores: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * M
    z_loss = torch.zeros((), dtype=torch.float64)
    for token in range(len(h)):
        z = [sum(h[token, d] * weight[i, d] for d in range(D)) for i in range(M)]
        s = loop_scores(kind, z, sigma)
        order = sorted(
            range(M), key=lambda i: (s[i].item() > 0, (s[i] + bias[i] * (s[i] > 0)).item(), z[i].item()), reverse=True
        )
        all_ids.append(order[: router.top_k])
        chosen = sum(s[i] for i in all_ids[-1]) if kind == "sigmoid_bias" and router.top_k > 1 else 1.0
        all_gates.append([s[i] / chosen for i in all_ids[-1]])
        total = sum(s)
        for i in range(M):
            share = s[i] / total if router.normalized and total > 0 else s[i]
            mean_scores[i] = mean_scores[i] + share / len(h)
        z_loss = z_loss + torch.log(sum(torch.exp(v) for v in z)) ** 2 / len(h)
    return all_ids, all_gates, mean_scores, z_loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scores", ["raw", "normalized"])
def test_values_and_gradients(kind: str, top_k: int, scores: str) -> None:
    router = make_router(kind, top_k, scores)
    generator = torch.Generator().manual_seed(8)
    up_TK, up_M = torch.randn(T, top_k, generator=generator), torch.randn(M, generator=generator)

    h_TD = hidden_states().requires_grad_()
    routing = router(h_TD)
    loss = (routing.topk_scores_TK * up_TK).sum() + routing.mean_scores_M @ up_M + 0.3 * routing.z_loss
    grads = torch.autograd.grad(loss, [h_TD, *router.parameters()])

    h = hidden_states().double().requires_grad_()
    weight = router.weight_MD.detach().double().requires_grad_()
    sigma = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    ids, gates, mean_scores, z_loss = loop_routing(kind, router, h, weight, sigma)
    gates_TK = torch.stack([torch.stack([g.squeeze() for g in row]) for row in gates])
    means_M = torch.stack([p.squeeze() for p in mean_scores])
    expected_loss = (gates_TK * up_TK).sum() + means_M @ up_M.double() + 0.3 * z_loss
    expected_grads = torch.autograd.grad(expected_loss, [h, weight] + ([sigma] if kind.startswith("norm") else []))

    assert routing.topk_expert_ids_TK.tolist() == ids
    assert routing.topk_expert_ids_TK.dtype == routing.tokens_per_expert_M.dtype == torch.int64
    flat = [i for row in ids for i in row]
    assert routing.tokens_per_expert_M.tolist() == [flat.count(i) for i in range(M)]
    for actual, expected in zip(
        [routing.topk_scores_TK, routing.mean_scores_M, routing.z_loss, *grads],
        [gates_TK, means_M, z_loss, *expected_grads],
        strict=True,
    ):
        assert actual.dtype == torch.float32
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", ["raw", "normalized"])
@pytest.mark.parametrize("top_k", [1, 4, M])
def test_rows_without_a_positive_logit(kind: str, scores: str, top_k: int) -> None:
    """Row 0 all zero, row 1 all negative, row 2 with two positives: finite values and gradients, distinct experts."""
    router = build_router(kind, M, M, top_k, scores, True, CONSTANT)  # the weight is the identity: z = h
    with torch.no_grad():
        router.weight_MD.copy_(torch.eye(M))
    z = -torch.rand(3, M, generator=torch.Generator().manual_seed(1)) - 0.1
    z[0] = 0.0
    z[2, 3], z[2, 9] = 1.0, 2.0
    z.requires_grad_()
    routing = router(z)
    assert all(len(set(row)) == top_k for row in routing.topk_expert_ids_TK.tolist())
    assert routing.tokens_per_expert_M.sum().item() == 3 * top_k
    assert set(routing.topk_expert_ids_TK[2, :2].tolist()) == ({3, 9} if top_k > 1 else {9})
    up_M = torch.arange(1.0, M + 1)
    (routing.topk_scores_TK.sum() + routing.mean_scores_M @ up_M).backward()
    for tensor in (routing.topk_scores_TK, routing.mean_scores_M, z.grad, *(p.grad for p in router.parameters())):
        assert tensor is not None and tensor.isfinite().all()
    if kind == "norm":
        assert (routing.topk_scores_TK[:2] == 0).all() and (routing.topk_scores_TK[2] > 0).sum() == min(top_k, 2)
        assert z.grad is not None and (z.grad[:2] == 0).all() and (z.grad[2] != 0).any()


def test_a_zero_row_counts_in_the_mean_as_zero() -> None:
    """Normalised scores sum to 1 a token, 0 for a token without any: the mean is over all tokens."""
    router = make_router("norm", 1, "normalized")
    h_TD = hidden_states()
    h_TD[:4] = 0.0
    torch.testing.assert_close(router(h_TD).mean_scores_M.sum().item(), (T - 4) / T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_input_is_routed_in_fp32(kind: str, autocast: bool) -> None:
    """Bit-equal to the fp32 call on the same rounded values, with and without autocast."""
    router = make_router(kind, 2)
    h_TD = hidden_states().bfloat16()

    def weight_grad(routing: Routing) -> Tensor:
        loss = routing.topk_scores_TK.sum() + routing.mean_scores_M.square().sum() + routing.z_loss
        return torch.autograd.grad(loss, router.weight_MD)[0]

    expected = router(h_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = router(h_TD)
    for name in ("topk_scores_TK", "topk_expert_ids_TK", "tokens_per_expert_M", "mean_scores_M", "z_loss"):
        assert getattr(actual, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(weight_grad(actual), weight_grad(expected))


def test_softmax_gate_values_are_not_renormalised() -> None:
    routing = make_router("softmax", 2)(hidden_states())
    assert (routing.topk_scores_TK.sum(-1) < 0.999).any()
    assert routing.mean_scores_M.sum().item() == pytest.approx(1.0)


def test_expert_bias_moves_the_selection_only() -> None:
    router = make_router("sigmoid_bias", 1)
    h_TD = hidden_states()
    with torch.no_grad():
        router.expert_bias_M.zero_()
        router.expert_bias_M[4] = 10.0
    routing = router(h_TD)
    assert routing.tokens_per_expert_M.tolist() == [T if i == 4 else 0 for i in range(M)]
    logits = h_TD @ router.weight_MD.T
    torch.testing.assert_close(routing.topk_scores_TK[:, 0], torch.sigmoid(logits[:, 4]))


def test_the_bias_of_a_pool_chooses_among_positive_scores() -> None:
    """Expert 3 has the largest bias, but a positive score in one of three tokens only."""
    router = build_router("norm_bias", M, M, 2, "raw", False, CONSTANT)  # the weight is the identity: z = h
    with torch.no_grad():
        router.weight_MD.copy_(torch.eye(M))
        router.expert_bias_M.copy_(torch.tensor([-9.0, -9.0, -8.9, 9.0] + [-9.0] * (M - 4)))
    h_TD = torch.full((3, M), -1.0)
    h_TD[0, [0, 1, 2]] = torch.tensor([3.0, 2.9, 2.8])  # the bias lifts expert 2 above expert 1
    h_TD[1, [0, 3]] = torch.tensor([5.0, 0.01])
    h_TD[2, 0], h_TD[2, 5] = 1.0, -0.5  # one positive: the largest of the others follows
    routing = router(h_TD)
    assert routing.topk_expert_ids_TK.tolist() == [[2, 0], [3, 0], [0, 5]]
    assert routing.topk_scores_TK[2].tolist()[1] == 0 and (routing.topk_scores_TK[:2] > 0).all()


def test_the_bias_of_a_pool_evens_out_its_load() -> None:
    """Three layers with different preferences; the sum of their loads becomes even, those of the layers need not."""
    routers = [build_router("norm_bias", D, M, 1, "raw", False, CONSTANT) for _ in range(3)]
    generator = torch.Generator().manual_seed(3)
    for router in routers:
        router.reset_parameters(0.7, generator)
    h_TD = torch.randn(400, D, generator=generator) + torch.linspace(-1, 1, D)
    imbalances = []
    for _ in range(300):
        load_LM = torch.stack([router(h_TD).tokens_per_expert_M for router in routers])
        imbalances.append(load_imbalance(load_LM.sum(0)).item())
        for router in routers:
            router.update_bias(load_LM.sum(0), 3e-3)
    assert imbalances[0] > 2 and imbalances[-1] < 1.2
    assert load_imbalance(load_LM).min() > 1.3
    assert all(torch.equal(router.expert_bias_M, routers[0].expert_bias_M) for router in routers)


class CalledFunctions(TorchFunctionMode):
    """Collects the names of torch's functions and methods that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_z_loss_is_computed_only_where_it_is_wanted(kind: str) -> None:
    """Without it: a zero without gradient, everything else bit for bit the same, and no logsumexp."""
    h_TD = hidden_states()
    with CalledFunctions() as called:
        expected = make_router(kind, 2)(h_TD)
    assert "logsumexp" in called.names
    assert expected.z_loss > 0 and expected.z_loss.requires_grad
    router = build_router(kind, D, M, 2, "raw", False, CONSTANT)
    router.load_state_dict(make_router(kind, 2).state_dict())
    with CalledFunctions() as called:
        routing = router(h_TD)
    assert "linear" in called.names and "logsumexp" not in called.names
    assert routing.z_loss.shape == () and routing.z_loss.dtype == torch.float32
    assert routing.z_loss == 0 and not routing.z_loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(routing[:4], expected[:4], strict=True))


def test_update_bias() -> None:
    router = build_router("sigmoid_bias", D, 5, 1, "raw", True, CONSTANT)
    router.update_bias(torch.tensor([10, 0, 4, 5, 1]), rate=1e-3)  # mean 4
    router.update_bias(torch.tensor([10, 0, 4, 3, 3]), rate=1e-3)
    torch.testing.assert_close(router.expert_bias_M, torch.tensor([-2e-3, 2e-3, 0.0, 0.0, 2e-3]))
    assert "expert_bias_M" in router.state_dict() and not router.expert_bias_M.requires_grad


def test_selection_takes_the_largest() -> None:
    preference = torch.tensor([[0.1, -3.0, 7.0, 2.0], [-4.0, -1.0, -2.0, -3.0]], requires_grad=True)
    assert select_experts(preference, 2).tolist() == [[2, 3], [1, 2]]


def test_reset_parameters() -> None:
    routers = [build_router(kind, 64, 96, 1, "raw", True, CONSTANT) for kind in KINDS]
    with torch.no_grad():
        for tensor in (routers[0].sigma, routers[2].expert_bias_M):
            tensor.fill_(5.0)
    for router in routers:
        router.reset_parameters(0.02, torch.Generator().manual_seed(9))
    for router in routers:
        assert router.weight_MD.dtype == torch.float32 and torch.equal(router.weight_MD, routers[0].weight_MD)
        # 6144 draws: the standard deviation is known to about 1 %.
        assert router.weight_MD.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(router.weight_MD.mean().item()) < 5 * 0.02 / math.sqrt(96 * 64)
    assert routers[0].sigma.tolist() == [1.0] and routers[2].expert_bias_M.tolist() == [0.0] * 96
    assert len(list(routers[1].parameters())) == 1


def test_unknown_words_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"router.kind is 'cosine': it must be norm, norm_bias, softmax or sigmoid_bias"
    ):
        build_router("cosine", D, M, 1, "raw", True, CONSTANT)
    with pytest.raises(ValueError, match=r"balance.scores is 'mean': it must be raw or normalized"):
        build_router("norm", D, M, 1, "mean", True, CONSTANT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", ["raw", "normalized"])
def test_logits_that_are_not_finite(kind: str, scores: str) -> None:
    """Whatever a token's logits are, its experts are distinct and there, its gates NaN, and other tokens as before."""
    router, h_TD = make_router(kind, 3, scores), hidden_states()
    expected = router(h_TD)
    broken = {1: float("nan"), 4: float("inf"), 6: float("-inf"), 9: 3e38}
    for token, value in broken.items():
        h_TD[token, token % D] = value
    routing = router(h_TD.requires_grad_())
    whole_T = torch.tensor([token not in broken for token in range(T)])
    for values_TK, expected_TK in zip(routing[:2], expected[:2], strict=True):
        assert torch.equal(values_TK[whole_T], expected_TK[whole_T])
    assert routing.topk_scores_TK[~whole_T].isnan().all()
    assert routing.topk_expert_ids_TK[~whole_T].tolist() == [[0, 1, 2]] * len(broken)
    assert routing.tokens_per_expert_M.sum() == 3 * T
    routing.topk_scores_TK.sum().backward()
    assert router.weight_MD.grad is not None and not router.weight_MD.grad.isfinite().all()


def test_the_choice_of_a_broken_token_is_not_used() -> None:
    """The top-k of NaN may return any ids, also such that no expert has."""
    logits_TM = torch.randn(2, M, generator=torch.Generator().manual_seed(1))
    logits_TM[1, 2] = float("nan")
    chosen_TK = torch.tensor([[3, 1], [10**6, -(10**6)]])
    gates_TK, ids_TK, _ = norm_route(logits_TM, torch.ones(1), CONSTANT, 2, False, chosen_TK=chosen_TK)
    assert ids_TK.tolist() == [[3, 1], [0, 1]]
    assert gates_TK.isnan().tolist() == [[False, False], [True, True]]
