"""Who owns which expert, against all partitions of small pools."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from router.ownership import Ownership, assign, random_ownership


def approx(*values: float) -> Any:
    return pytest.approx(values)


def partitions(layers: int, experts: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each layer equally many experts, as owners."""
    yield from sorted(set(itertools.permutations(np.repeat(np.arange(layers), experts // layers).tolist())))


def best_of_all(load_LM: Tensor, coverage: float) -> tuple[list[tuple[int, ...]], bool]:
    """Try every partition: coverage first, then the sum of shares, then the sum of ranks; return those that tie."""
    layers, experts = load_LM.shape
    rows = load_LM.tolist()
    shares = [[n / sum(row) if sum(row) else 0.0 for n in row] for row in rows]
    ranks = [[sum((-b, j) < (-a, i) for j, b in enumerate(row)) for i, a in enumerate(row)] for row in shares]

    def value(owners: tuple[int, ...]) -> tuple[bool, float, int]:
        own = [sum(shares[layer][e] for e in range(experts) if owners[e] == layer) for layer in range(layers)]
        covered = all(share >= coverage - 1e-9 for share, row in zip(own, rows, strict=True) if sum(row))
        return covered, round(sum(own), 9), -sum(ranks[owner][e] for e, owner in enumerate(owners))

    values = {owners: value(owners) for owners in partitions(layers, experts)}
    best = max(values.values())
    return [owners for owners, reached in values.items() if reached == best], best[0]


@pytest.mark.parametrize(("layers", "experts"), [(1, 3), (2, 4), (2, 6), (3, 6), (4, 4)])
@pytest.mark.parametrize("power", [0, 1, 6])
def test_best_of_all_partitions(layers: int, experts: int, power: int) -> None:
    """Whatever coverage is asked for: what the largest sum gives, a little more than that, or too much."""
    generator, feasible_above = torch.Generator().manual_seed(layers + experts + power), 0
    for _ in range(6):
        load_LM = torch.rand(layers, experts, generator=generator).pow(power).mul(100).long()
        least = min(assign(load_LM, 0.0).shares)
        for coverage in (0.0, least, min(1.0, least + 0.02), 0.99):
            found = assign(load_LM, coverage)
            ties, feasible = best_of_all(load_LM, coverage)
            assert found.owners in ties and found.feasible == feasible
            feasible_above += feasible and least < coverage < 0.99
    assert feasible_above or power != 1 or layers in (1, 4), "no load needed the 0/1 program"


def test_coverage_costs_a_part_of_the_sum() -> None:
    load_LM = torch.tensor([[20, 50, 20, 10], [45, 30, 15, 10]])
    assert assign(load_LM, 0.55) == Ownership((1, 0, 0, 1), approx(0.7, 0.55), (0.0, 0.0), True)
    assert assign(load_LM, 0.6) == Ownership((1, 0, 1, 0), approx(0.6, 0.6), (0.0, 0.0), True)
    # More is impossible, so the largest sum counts again, and what each layer lacks is told.
    assert assign(load_LM, 0.65) == Ownership((1, 0, 0, 1), approx(0.7, 0.55), approx(0.0, 0.1), False)


def test_a_scale_of_the_load_and_its_type_change_nothing() -> None:
    load_LM = torch.rand(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert assign(load_LM, 0.3).owners == assign(load_LM * 2.0**20, 0.3).owners
    counts_LM = (load_LM * 1000).long()
    assert assign(counts_LM, 0.3) == assign(counts_LM.double(), 0.3)


def test_layers_without_tokens_take_what_is_left() -> None:
    load_LM = torch.tensor([[1, 9, 90, 0], [0, 0, 0, 0]])
    assert assign(load_LM, 0.95) == Ownership((1, 0, 0, 1), approx(0.99, 1.0), (0.0, 0.0), True)
    assert assign(torch.zeros(2, 4), 0.95).feasible
    # One layer lacks coverage and the other has nothing to cover.
    found = assign(torch.tensor([[25, 25, 25, 25], [0, 0, 0, 0]]), 0.95)
    assert found.shortfalls == approx(0.45, 0.0) and not found.feasible


def test_ties_go_by_rank_then_by_number() -> None:
    assert assign(torch.ones(2, 4), 0.0).owners == (0, 0, 1, 1)
    # Experts 0 and 3 bring nothing to either layer. Their ranks are 2 and 3 in layer 0, but 2 and 5 in layer 1.
    load_LM = torch.tensor([[0, 60, 40, 0, 0, 0], [0, 0, 0, 0, 50, 50]])
    assert assign(load_LM, 0.9).experts_by_layer == ((1, 2, 3), (0, 4, 5))
    # Experts 1 and 2 bring as much to layer 0 beyond layer 1. Their ranks are 1 and 2 there, but 1 and 3 in layer 1.
    assert assign(torch.tensor([[29, 22, 13, 0], [6, 9, 0, 49]]), 0.0).owners == (0, 1, 0, 1)
    # The same where the 0/1 program decides, which has to place experts 4 and 5.
    load_LM = torch.tensor([[20, 50, 20, 10, 0, 0], [45, 30, 15, 10, 0, 0]])
    ties, _ = best_of_all(load_LM, 0.6)
    assert assign(load_LM, 0.6).owners in ties
    # Ranks of 11 or of 14 have a sum of 19; the largest sum, 20, lacks coverage.
    assert assign(torch.tensor([[0, 5, 3, 0, 6, 2], [0, 4, 2, 3, 4, 3]]), 7 / 16).owners == (0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize("coverage", [0.0, 0.8, 0.95])
def test_the_largest_model(coverage: float) -> None:
    """48 layers and 384 experts, each layer with three favourites among the others'."""
    generator = torch.Generator().manual_seed(2)
    load_LM = torch.rand(48, 384, generator=generator) * 1e-3
    for layer in range(48):
        own = torch.arange(8 * layer, 8 * layer + 8)
        others = torch.randperm(384, generator=generator)[:3]
        load_LM[layer, own] += torch.rand(8, generator=generator)
        load_LM[layer, others] += torch.rand(3, generator=generator) * 0.4
    found = assign(load_LM, coverage)
    assert {len(own) for own in found.experts_by_layer} == {8}
    assert sorted(e for own in found.experts_by_layer for e in own) == list(range(384))
    assert found.feasible == (min(found.shares) >= coverage - 1e-9)
    assert found == assign(load_LM, coverage)


def test_random_ownership() -> None:
    first, again, other = random_ownership(3, 12, 1), random_ownership(3, 12, 1), random_ownership(3, 12, 2)
    assert first == again != other
    assert np.bincount(first.owners).tolist() == [4, 4, 4]
    assert first.owners != tuple(sorted(first.owners))
    assert first.shares == approx(1 / 3, 1 / 3, 1 / 3) and first.feasible


@pytest.mark.parametrize(
    ("load_LM", "coverage", "said"),
    [
        (torch.ones(2, 3), 0.9, "multiple of model.layers"),
        (torch.ones(4, 2), 0.9, "multiple of model.layers"),
        (torch.ones(2, 4), 1.1, "lock.coverage is 1.1"),
        (torch.tensor([[1.0, float("nan")], [1, 1]]), 0.9, "not finite"),
        (torch.tensor([[1.0, -1.0], [1, 1]]), 0.9, "negative"),
    ],
)
def test_what_cannot_be_assigned(load_LM: Tensor, coverage: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assign(load_LM, coverage)
