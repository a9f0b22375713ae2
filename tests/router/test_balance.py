"""Balance losses against loops over the formulas of docs/method.md; the memory of loads in every scope and delay.

Letters: L layers, T tokens, M experts that a layer sees, K top-k.
"""

import copy

import pytest
import torch
from torch import Tensor

from router import LoadStatistics, balance_coefficients, build_router, load_of_groups

L, M = 6, 5


def random_loads(seed: int) -> Tensor:
    return torch.randint(0, 30, (L, M), generator=torch.Generator().manual_seed(seed))


def fractions_of(loads_LM: Tensor) -> Tensor:
    return (loads_LM.double() / loads_LM.double().sum(1, keepdim=True)).float()


def loop_losses(f: list[list[float]], p: list[list[float]], groups: int) -> tuple[float, float]:
    """(per-layer loss, pool loss) with coefficients 1, as Eq. M15 and M16 of docs/method.md."""
    layer_loss = sum(M * sum(f[layer][i] * p[layer][i] for i in range(M)) for layer in range(L))
    pool_loss = 0.0
    shared = L // groups
    for group in range(groups):
        layers = range(group * shared, (group + 1) * shared)
        for i in range(M):
            fbar = sum(f[layer][i] for layer in layers) / shared
            pbar = sum(p[layer][i] for layer in layers) / shared
            pool_loss += M * fbar * pbar
    return layer_loss, pool_loss


@pytest.mark.parametrize("groups", [1, 2, 3, L])
@pytest.mark.parametrize(("layer_coeff", "pool_coeff"), [(0.03, 0.0), (0.0, 0.02), (0.03, 0.02)])
def test_sum_over_layers_is_the_loss(groups: int, layer_coeff: float, pool_coeff: float) -> None:
    fractions_LM = fractions_of(random_loads(1))
    mean_scores_LM = torch.rand(L, M, generator=torch.Generator().manual_seed(2))
    coeffs_LM = balance_coefficients(fractions_LM, layer_coeff, pool_coeff, groups)
    total = sum((coeffs_LM[layer] * mean_scores_LM[layer]).sum().item() for layer in range(L))
    layer_loss, pool_loss = loop_losses(fractions_LM.tolist(), mean_scores_LM.tolist(), groups)
    assert total == pytest.approx(layer_coeff * layer_loss + pool_coeff * pool_loss, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, L])
def test_load_of_groups(groups: int) -> None:
    loads_LM, shared = random_loads(5), L // groups
    for layer, row in enumerate(load_of_groups(loads_LM, groups).tolist()):
        layers = [other for other in range(L) if other // shared == layer // shared]
        assert row == [sum(int(loads_LM[other, i]) for other in layers) for i in range(M)]


def test_private_experts_make_both_losses_equal() -> None:
    """groups = L: a group is one layer, whose pool loss is the Switch loss."""
    fractions_LM = fractions_of(random_loads(3))
    layer = balance_coefficients(fractions_LM, 0.01, 0.0, groups=L)
    torch.testing.assert_close(balance_coefficients(fractions_LM, 0.0, 0.01, groups=L), layer)


def test_groups_must_divide_layers() -> None:
    with pytest.raises(ValueError, match=r"groups is 4.*6"):
        balance_coefficients(fractions_of(random_loads(4)), 0.0, 0.01, groups=4)


@pytest.mark.parametrize("scores", ["raw", "normalized"])
def test_only_the_router_gets_gradient(scores: str) -> None:
    """The load enters as a constant; the gradient is that of the mean scores with f held fixed."""
    torch.manual_seed(0)
    router = build_router("norm", hidden=7, num_experts=M, top_k=2, scores=scores, z_loss=False, constant=2.0)
    router.reset_parameters(0.5)
    h_TD = torch.randn(9, 7, requires_grad=True)
    routing = router(h_TD)
    fractions_LM = routing.tokens_per_expert_M[None] / (9 * 2)
    coeffs_LM = balance_coefficients(fractions_LM, 0.1, 0.0, groups=1)
    assert not coeffs_LM.requires_grad and not routing.tokens_per_expert_M.requires_grad
    (coeffs_LM[0] * routing.mean_scores_M).sum().backward()

    weight = router.weight_MD.detach().double().requires_grad_()
    z = h_TD.detach().double() @ weight.T
    s = 2.0 * z.relu() / (z.norm(dim=1, keepdim=True) + 1e-8)
    if scores == "normalized":
        s = s / s.sum(1, keepdim=True).clamp(min=1e-12)
    (0.1 * M * fractions_LM[0].double() @ s.mean(0)).backward()
    assert router.weight_MD.grad is not None and weight.grad is not None
    torch.testing.assert_close(router.weight_MD.grad.double(), weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_micro_batch_scope(delay: int) -> None:
    statistics = LoadStatistics("micro_batch", delay, L, M)
    for index in range(8):
        statistics.record_micro_batch(index, random_loads(index))
        statistics.record_step(index, random_loads(1000 + index))  # the other scope: no effect
        fractions_LM = statistics.fractions(index, step=index // 2)
        if index < delay:
            assert fractions_LM is None
        else:
            assert fractions_LM is not None and fractions_LM.dtype == torch.float32
            torch.testing.assert_close(fractions_LM, fractions_of(random_loads(index - delay)))
        assert len(statistics.state_dict()["loads"]) == min(index + 1, delay)  # nothing older is kept


@pytest.mark.parametrize("delay", [1, 2])
def test_global_batch_scope(delay: int) -> None:
    statistics = LoadStatistics("global_batch", delay, L, M)
    for step in range(6):
        for index in range(3 * step, 3 * step + 3):
            statistics.record_micro_batch(index, random_loads(1000 + index))  # the other scope: no effect
            fractions_LM = statistics.fractions(index, step)
            if step < delay:
                assert fractions_LM is None
            else:
                assert fractions_LM is not None and fractions_LM.dtype == torch.float32
                torch.testing.assert_close(fractions_LM, fractions_of(random_loads(step - delay)))
        statistics.record_step(step, random_loads(step))
        assert len(statistics.state_dict()["loads"]) == min(step + 1, delay)


@pytest.mark.parametrize("delay", [0, 1])
def test_interleaved_micro_batches_do_not_mix(delay: int) -> None:
    """Forwards end in pairs, and backwards begin in the opposite order: each finds its own load."""
    statistics = LoadStatistics("micro_batch", delay, L, M)
    for first in range(0, 6, 2):
        statistics.record_micro_batch(first, random_loads(first))
        statistics.record_micro_batch(first + 1, random_loads(first + 1))
        for index in (first + 1, first):
            fractions_LM = statistics.fractions(index, step=0)
            if index - delay < 0:
                assert fractions_LM is None
            else:
                assert fractions_LM is not None
                torch.testing.assert_close(fractions_LM, fractions_of(random_loads(index - delay)))


def test_a_missing_load_is_an_error() -> None:
    statistics = LoadStatistics("micro_batch", 1, L, M)
    statistics.record_micro_batch(0, random_loads(0))
    with pytest.raises(RuntimeError, match=r"micro-batch 2 .*load of micro-batch 1, but has only \[0\]"):
        statistics.fractions(2, step=0)
    statistics = LoadStatistics("global_batch", 1, L, M)
    with pytest.raises(RuntimeError, match=r"step 1 .*load of step 0"):
        statistics.fractions(5, step=1)


def test_the_caller_may_reuse_its_tensor() -> None:
    statistics = LoadStatistics("global_batch", 1, L, M)
    load_LM = random_loads(0)
    statistics.record_step(0, load_LM)
    load_LM.zero_()
    fractions_LM = statistics.fractions(1, step=1)
    assert fractions_LM is not None
    torch.testing.assert_close(fractions_LM, fractions_of(random_loads(0)))


@pytest.mark.parametrize(("scope", "delay"), [("micro_batch", 2), ("global_batch", 2)])
def test_state_round_trip(scope: str, delay: int) -> None:
    """A run saved after its second step continues with bit-equal fractions."""

    def advance(statistics: LoadStatistics, steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            for index in (2 * step, 2 * step + 1):
                statistics.record_micro_batch(index, random_loads(index))
                fractions_LM = statistics.fractions(index, step)
                if fractions_LM is not None:
                    seen.append(fractions_LM)
            statistics.record_step(step, random_loads(step))
        return seen

    straight, saved = LoadStatistics(scope, delay, L, M), LoadStatistics(scope, delay, L, M)
    advance(straight, range(2))
    advance(saved, range(2))
    resumed = LoadStatistics(scope, delay, L, M)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    expected, actual = advance(straight, range(2, 5)), advance(resumed, range(2, 5))
    assert len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_state_of_a_run_that_numbered_micro_batches_otherwise() -> None:
    """Loads, and the first number that has one, move by the shift; numbers begin at 0 all the same."""
    saved = LoadStatistics("micro_batch", 1, L, M)
    saved.begin_at(4)
    for index in (4, 5):
        saved.record_micro_batch(index, random_loads(index))
        saved.fractions(index, step=0)
    resumed = LoadStatistics("micro_batch", 1, L, M)
    resumed.load_state_dict(saved.state_dict(), shift=3)
    assert resumed.fractions(7, step=0) is None
    fractions_LM = resumed.fractions(9, step=0)
    assert fractions_LM is not None
    torch.testing.assert_close(fractions_LM, fractions_of(random_loads(5)))
    resumed.load_state_dict(saved.state_dict(), shift=-5)
    assert resumed.fractions(0, step=0) is None
    assert resumed.fractions(1, step=0) is not None


def test_state_of_other_knobs_is_refused() -> None:
    state = LoadStatistics("micro_batch", 1, L, M).state_dict()
    with pytest.raises(ValueError, match="micro_batch and 2, the checkpoint has micro_batch and 1"):
        LoadStatistics("micro_batch", 2, L, M).load_state_dict(state)


@pytest.mark.parametrize(("scope", "delay"), [("global_batch", 0), ("micro_batch", -1), ("epoch", 1)])
def test_knobs_out_of_range(scope: str, delay: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        LoadStatistics(scope, delay, L, M)
