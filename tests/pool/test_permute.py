"""Permutation and combination against loops over tokens.

Letters: T tokens, K experts per token, D hidden, M experts, N = T * K assignments.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pool.permute import Permutation, combine, merge_order, permutation, permute
from pool.placement import Placement

D, M = 5, 6
PLACEMENT = Placement((2, 5, 0, 4, 1, 3), 2)
UNUSED = 5


def routing(tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Permutation]:
    """Distinct experts a token, expert UNUSED never chosen, and the permutation."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(M - 1, generator=generator)[:top_k] for _ in range(tokens)])
    assert UNUSED not in ids_TK
    return ids_TK, permutation(ids_TK, PLACEMENT.position_M)


def loop_order(ids_TK: Tensor) -> list[tuple[int, int]]:
    """(token, k) of every place, by a loop over the experts in shard-major order."""
    tokens, top_k = ids_TK.shape
    return [(t, k) for i in PLACEMENT.order for t in range(tokens) for k in range(top_k) if ids_TK[t, k] == i]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (9, 1), (1, 3), (7, 3)])
def test_permutation(tokens: int, top_k: int) -> None:
    ids_TK, p = routing(tokens, top_k)
    assert [(n // top_k, n % top_k) for n in p.order_N.tolist()] == loop_order(ids_TK)
    assert p.order_N[p.inverse_N].tolist() == list(range(tokens * top_k))
    assert p.tokens_per_expert_M.tolist() == [int((ids_TK == i).sum()) for i in PLACEMENT.order]
    assert p.tokens_per_expert_M[PLACEMENT.position_M[UNUSED]] == 0


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (9, 1), (1, 3), (7, 3)])
def test_permute(tokens: int, top_k: int) -> None:
    ids_TK, p = routing(tokens, top_k)
    x_TD = randn(tokens, D, seed=1)
    assert torch.equal(permute(x_TD, p), torch.stack([x_TD[t] for t, _ in loop_order(ids_TK)]))


@pytest.mark.parametrize("top_k", [1, 3])
def test_permute_gradient(top_k: int) -> None:
    _, p = routing(6, top_k)
    x_TD = randn(6, D, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, p), (x_TD,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, top_k", [(1, 1), (9, 1), (7, 3)])
def test_combine_and_its_gradients(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    """y_t = sum_k g_tk y_(place of t, k), in fp32 whatever the dtype of the experts' outputs."""
    ids_TK, p = routing(tokens, top_k)
    places = {assignment: n for n, assignment in enumerate(loop_order(ids_TK))}
    y_ND = randn(tokens * top_k, D, seed=3, dtype=dtype).requires_grad_()
    scores_TK = randn(tokens, top_k, seed=4, dtype=torch.float32).requires_grad_()
    dy_TD = randn(tokens, D, seed=5, dtype=torch.float32)
    got = combine(y_ND, scores_TK, p)
    assert got.dtype == torch.float32
    got_grads = torch.autograd.grad(got, (y_ND, scores_TK), dy_TD)

    y, g = y_ND.detach().double().requires_grad_(), scores_TK.detach().double().requires_grad_()
    rows = []
    for t in range(tokens):
        row = torch.zeros(D, dtype=torch.float64)
        for k in range(top_k):
            row = row + g[t, k] * y[places[t, k]]
        rows.append(row)
    want = torch.stack(rows)
    want_grads = torch.autograd.grad(want, (y, g), dy_TD.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert got_grads[0].dtype == dtype
    torch.testing.assert_close(got_grads[0], want_grads[0].to(dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_grads[1].double(), want_grads[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_there_and_back(top_k: int) -> None:
    """With experts that multiply by their own number the layer is sum_k g_tk i_tk x_t; also the gradient through it."""
    tokens = 8
    ids_TK, p = routing(tokens, top_k, seed=6)
    x_TD = randn(tokens, D, seed=7, dtype=torch.float32).requires_grad_()
    scores_TK = randn(tokens, top_k, seed=8, dtype=torch.float32)
    number_N = torch.tensor(PLACEMENT.order).repeat_interleave(p.tokens_per_expert_M)
    y_TD = combine(permute(x_TD, p) * number_N[:, None], scores_TK, p)
    factor_T1 = (scores_TK * ids_TK).sum(1, keepdim=True)
    torch.testing.assert_close(y_TD, factor_T1 * x_TD, rtol=1e-5, atol=1e-5)
    dy_TD = randn(tokens, D, seed=9, dtype=torch.float32)
    (dx_TD,) = torch.autograd.grad(y_TD, x_TD, dy_TD)
    torch.testing.assert_close(dx_TD, factor_T1 * dy_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "counts",
    [
        [[2, 0, 1]],
        [[2, 0, 1], [0, 3, 1]],
        [[1, 2, 0, 3], [0, 0, 0, 0], [2, 0, 0, 1], [1, 1, 0, 1]],
        [[0, 0], [0, 0]],
    ],
)
def test_merge_order(counts: list[list[int]]) -> None:
    """Experts in order, within an expert the batches in order, within a batch the rows in order."""
    rows = [(e, b, i) for b, batch in enumerate(counts) for e, count in enumerate(batch) for i in range(count)]
    index_N, inverse_N = merge_order(torch.tensor(counts), len(rows))
    assert index_N.dtype == torch.int64
    assert [rows[n] for n in index_N.tolist()] == sorted(rows)
    assert index_N[inverse_N].tolist() == list(range(len(rows)))


@pytest.mark.parametrize("tokens, top_k", [(1, 1), (9, 1), (7, 3)])
def test_permutation_as_it_is_compiled(tokens: int, top_k: int) -> None:
    """And as a GPU computes it: by other operations, in one graph."""
    ids_TK, expected = routing(tokens, top_k)
    found = torch.compile(permutation, fullgraph=True, backend="eager")(ids_TK, PLACEMENT.position_M)
    for name in ("order_N", "inverse_N", "tokens_per_expert_M"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype == torch.int64 and torch.equal(mine, theirs)
    torch._dynamo.reset()
