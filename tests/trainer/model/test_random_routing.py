"""Random experts in place of a router's: what is drawn, and that it does not depend on the rank."""

from __future__ import annotations

import torch
from torch import Tensor

from router import Reach, Routing, owned
from trainer.model.random_routing import random_routing

EXPERTS, LENGTH, TOP_K = 6, 50, 2


def drawn(sequences: range, seed: int = 0, layer: int = 3, reach: Reach | None = None) -> Tensor:
    """The experts of these sequences' tokens in `layer`; the rest of the routing is as it was."""
    tokens = len(sequences) * LENGTH
    scores_TK = torch.rand(tokens, TOP_K)
    learned = Routing(scores_TK, torch.zeros(tokens, TOP_K, dtype=torch.int64), *torch.zeros(3, EXPERTS).unbind())
    reroute = random_routing(layer, EXPERTS, seed, sequences, reach)
    assert reroute(layer - 1, learned) is learned
    done = reroute(layer, learned)
    assert done.topk_scores_TK is scores_TK
    assert torch.equal(done.tokens_per_expert_M, torch.bincount(done.topk_expert_ids_TK.flatten(), minlength=EXPERTS))
    return done.topk_expert_ids_TK


def test_experts_are_different_and_all_equally_likely() -> None:
    ids_TK = drawn(range(200))
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    share_M = torch.bincount(ids_TK.flatten(), minlength=EXPERTS) / ids_TK.numel()
    assert (share_M - 1 / EXPERTS).abs().max() < 0.01
    first_M = torch.bincount(ids_TK[:, 0], minlength=EXPERTS) / len(ids_TK)
    assert (first_M - 1 / EXPERTS).abs().max() < 0.02, "the k-th place has no favourites"


def test_a_sequence_has_its_own_whoever_draws() -> None:
    whole = drawn(range(4, 8))
    assert torch.equal(whole, torch.cat([drawn(range(4, 5)), drawn(range(5, 8))]))
    other = [drawn(range(4, 8), seed=1), drawn(range(4, 8), layer=2), drawn(range(5, 9))]
    assert not any(torch.equal(whole, ids_TK) for ids_TK in other)


def test_a_locked_layer_draws_from_its_own_experts() -> None:
    ids_TK = drawn(range(200), reach=owned(torch.tensor([0, 3, 5]), EXPERTS))
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    share_M = torch.bincount(ids_TK.flatten(), minlength=EXPERTS) / ids_TK.numel()
    assert (share_M - torch.tensor([1, 0, 0, 1, 0, 1]) / 3).abs().max() < 0.01
