"""The constant c of NormRouter."""

import math

import pytest
import torch

from router import norm_constant


def test_one_expert_is_exact() -> None:
    """M = 1: y is 1 or 0 and half of the draws must be left out, so that c is 1."""
    assert norm_constant(1, 1) == pytest.approx(1.0, rel=1e-6)


def test_all_experts_of_a_large_pool() -> None:
    """k = M large: half of ||x||^2 is on positive entries, so that c is near sqrt(2)."""
    assert norm_constant(256, 256) == pytest.approx(math.sqrt(2), rel=0.01)


def test_against_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(77)
    terms = []
    for x in torch.randn(10_000, 33, generator=generator, dtype=torch.float64).tolist():
        norm = math.sqrt(sum(v * v for v in x))
        largest = sorted((max(v / norm, 0.0) for v in x), reverse=True)[:3]
        terms.append(1 / math.sqrt(sum(v * v for v in largest)))
    mean = sum(terms) / len(terms)
    variance = sum((t - mean) ** 2 for t in terms) / len(terms)
    assert abs(norm_constant(33, 3) - mean) < 5 * math.sqrt(variance * (1 / 1e4 + 1 / 1e5))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    norm_constant.cache_clear()
    first = norm_constant(21, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    norm_constant.cache_clear()
    assert norm_constant(21, 2) == first


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_top_k_out_of_range(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}.*1 to the 5"):
        norm_constant(5, top_k)
