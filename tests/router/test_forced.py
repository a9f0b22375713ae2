"""Forced routing: every expert in turn, with the gate values that it would have had."""

import pytest
import torch

from router import Balanced
from tests.router.test_routers import KINDS, D, M, T, hidden_states, make_router


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_in_turn(kind: str, top_k: int) -> None:
    """Over layers of the same experts, by a plain loop; gates are those of a layer that chooses all experts."""
    router, everything = make_router(kind, top_k), make_router(kind, M)
    turn = 0
    for place in range(4):
        h_TD = hidden_states(place).requires_grad_()
        routing = router(h_TD, Balanced(torch.tensor(place)))
        assert routing.topk_expert_ids_TK.tolist() == [
            [(turn + token * top_k + k) % M for k in range(top_k)] for token in range(T)
        ]
        turn += T * top_k
        load = torch.bincount(routing.topk_expert_ids_TK.flatten(), minlength=M)
        assert torch.equal(load, routing.tokens_per_expert_M) and load.max() - load.min() <= 1
        free = everything(h_TD)
        expected = free.topk_scores_TK.gather(
            1, (free.topk_expert_ids_TK[:, None] == routing.topk_expert_ids_TK[:, :, None]).int().argmax(-1)
        )
        if kind == "sigmoid_bias" and top_k > 1:
            expected = expected / expected.sum(-1, keepdim=True)
        elif kind == "sigmoid_bias":  # gates of several experts are divided by their sum
            expected = expected * torch.sigmoid(h_TD @ router.weight_MD.T).sum(-1, keepdim=True)
        torch.testing.assert_close(routing.topk_scores_TK, expected)
        torch.testing.assert_close(routing.mean_scores_M, free.mean_scores_M)
        torch.testing.assert_close(routing.z_loss, free.z_loss)
        (gradient,) = torch.autograd.grad(routing.topk_scores_TK.square().sum(), h_TD)
        assert gradient.shape == (T, D) and gradient.abs().max() > 0
